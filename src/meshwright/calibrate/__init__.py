"""How long a machine's own kernels and transfers take. A request goes in, figures come out (record/calibration.py)."""
