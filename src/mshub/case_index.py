"""The case index: what the active-learning loop knows of a studies folder or a PACS, in one SQLite file.

::

    scores, failures    image, model, version -> what was measured of it, or why it cannot be      computed again
    agreements          image, model, version -> how its label was corrected                       computed again
    label dice          image, model, version -> how its stored label agrees with the model        computed again
    interests           client, model -> when it was asked for last                                short-lived
    leases              image -> who has it in work, and until when                                short-lived
    choices, audits     which case was offered to whom, and why; when the next audit is due        a log
    batches             images to pre-label, and how far that is                                   a log

Many threads of one server use one `CaseIndex` at once, and now and then another process opens the same file. Threads
take turns at one connection; processes at SQLite's lock: `mshub.case_database` says how. Every method is one
transaction, so what it returns or changes is of one moment, and whoever reads never waits for another process.

A damaged file is moved aside and a new one started: only the two logs are lost with it, and no label ever is. A file of
a newer MSHub is refused. The schema and its history are in `mshub.case_schema`.
"""

from __future__ import annotations

from mshub.case_batches import ITEM_STATES, Batch, BatchState, CaseBatches, Ending
from mshub.case_offers import CaseOffers, ChoiceRow, Lease
from mshub.case_scores import AgreementRow, CaseScores

__all__ = ["ITEM_STATES", "AgreementRow", "Batch", "BatchState", "CaseIndex", "ChoiceRow", "Ending", "Lease"]


class CaseIndex(CaseScores, CaseOffers, CaseBatches):
    """All of it, in one file.

    ::

        with CaseIndex(studies / ".mshub" / "cases.sqlite") as index:
            index.keep_score("case-1", "liver", "v1", prediction.uncertainty)
            image = index.lease(["case-1", "case-2"], "ann", 3600, model="liver")

    Parameters
    ----------
    path : Path
        The SQLite file; it and its folder are created if needed.
    clock : callable
        Seconds since the epoch, for whoever cannot wait.

    Raises
    ------
    StoreError
        By every method: the file cannot be opened, read or written, is of a newer MSHub or of another program, is
        damaged (once: the next call starts a new file), or the index was closed.
    """
