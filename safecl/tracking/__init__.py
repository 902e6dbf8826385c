"""Tracking of sweeps with MLflow.

A `Run` is one MLflow run. Runs are nested: sweep -> cell -> trial. logbook.py decides when which run is sent. trials.py,
cells.py and sweeps.py make the runs, with readable names from names.py. `Tracker` (tracker.py) sends runs from its own thread.
It never raises into a sweep, and writes runs that cannot be sent to disk (spool.py). During a sweep only server.py talks to
MLflow.
"""

from safecl.tracking.logbook import Logbook as Logbook
from safecl.tracking.messages import EXPERIMENT as EXPERIMENT
from safecl.tracking.messages import Run as Run
from safecl.tracking.tracker import Tracker as Tracker
