"""Holding a layout against one process. The torch side: the two runs; launch, explain and report have the rest."""
