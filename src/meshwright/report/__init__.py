"""Accounts drawn for people: text, JSON and a page. Loads no torch."""
