"""Mending model folders that do not load: what is wrong is found, shown as it would be changed, and changed when asked.

The way through the room: a `Draft` reads the folder; each function in `faults` finds one fault and plans its mending in the
draft; `writing` carries the draft out, in place or as a copy. Nothing of the folder is run: no code that it names, no pickle;
a chat template is rendered in Jinja's sandbox.
"""

from chaccu.weights.repair.draft import Draft, Finding, RepairOptions
from chaccu.weights.repair.faults import FAULTS, examine_folder
from chaccu.weights.repair.writing import mend_copy, mend_folder

__all__ = ["FAULTS", "Draft", "Finding", "RepairOptions", "examine_folder", "mend_copy", "mend_folder"]
