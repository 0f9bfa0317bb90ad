"""What the operating system says of this process: its memory, its age."""

import os
import re
import resource
import time
from pathlib import Path


def resident_bytes() -> float:
    """This process's resident set now, in bytes; its peak where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return float(pages) * resource.getpagesize()
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> float:
    """The largest resident set of this process so far, in bytes."""
    # Not getrusage where Linux says it better: that figure survives exec, so a child starts with its parent's peak.
    try:
        peak = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        peak = None
    if peak:
        return float(peak[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def process_start_s() -> float:
    """When this process was started, seconds since the epoch; now, where the system does not tell."""
    now = time.time()
    try:
        # man proc_pid_stat: starttime is the 22nd field, counted in ticks from boot; the 2nd may hold blanks.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up_s = float(Path("/proc/uptime").read_text().split()[0])
        return min(now, now - up_s + ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return now
