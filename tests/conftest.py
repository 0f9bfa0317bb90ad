"""What holds for the whole suite."""

import signal

# A shell starts background jobs with SIGINT ignored, which their children inherit: Ctrl-C could not be tried.
signal.signal(signal.SIGINT, signal.default_int_handler)
