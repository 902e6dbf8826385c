"""MLflow: when it is told what (logbook.py), of trials, cells and sweeps (a file each), in names that people know (names.py).

A `Run` is one MLflow run: sweep -> cell -> trial. `Tracker` (tracker.py) sends runs from a thread of its own, never raises into a
sweep, and writes what could not be sent to disk (spool.py). server.py alone talks to MLflow.
"""

from safecl.tracking.logbook import Logbook as Logbook
from safecl.tracking.messages import EXPERIMENT as EXPERIMENT
from safecl.tracking.messages import Run as Run
from safecl.tracking.tracker import Tracker as Tracker
