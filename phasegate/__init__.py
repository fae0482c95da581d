"""phasegate: phase experiments on a mixture-of-experts classifier."""

import os

PARENT = os.getppid()  # who started this process; read before anything slow is imported, for it may be killed meanwhile
