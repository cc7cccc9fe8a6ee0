"""The tables of the case index, and how an older file is brought up to date.

`MIGRATIONS` is the history of the schema: entry ``n`` leads from version ``n`` to ``n + 1``, and `PRAGMA user_version`
says how many of them a file has seen. A released entry is never edited: a change is a new entry at the end. What can
be computed again need not be converted: a migration may simply delete the scores.
"""

from __future__ import annotations

_FIRST = (
    # What a version measured of an image, or why it could not.
    """
    CREATE TABLE scores (
        image TEXT NOT NULL, model TEXT NOT NULL, version TEXT NOT NULL,
        state TEXT NOT NULL, profile TEXT NOT NULL, at REAL NOT NULL,
        measured TEXT, embedding BLOB, failure TEXT,
        PRIMARY KEY (model, version, image),
        CHECK ((measured IS NULL) = (embedding IS NULL) AND (measured IS NULL) <> (failure IS NULL))
    )
    """,
    "CREATE INDEX scores_of_image ON scores (image)",
    """
    CREATE TABLE agreements (
        image TEXT NOT NULL, model TEXT NOT NULL, version TEXT NOT NULL,
        dice TEXT NOT NULL, edited_voxels INTEGER NOT NULL, score REAL, trained INTEGER NOT NULL, at REAL NOT NULL,
        PRIMARY KEY (model, version, image)
    )
    """,
    """
    CREATE TABLE label_dice (
        image TEXT NOT NULL, model TEXT NOT NULL, version TEXT NOT NULL,
        label_state TEXT NOT NULL, dice TEXT NOT NULL,
        PRIMARY KEY (model, version, image)
    )
    """,
    "CREATE TABLE interests (client TEXT NOT NULL, model TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (client, model))",
    """
    CREATE TABLE leases (
        image TEXT NOT NULL PRIMARY KEY, client TEXT NOT NULL, model TEXT NOT NULL, until REAL NOT NULL
    )
    """,
    """
    CREATE TABLE choices (
        id INTEGER PRIMARY KEY, image TEXT NOT NULL, model TEXT NOT NULL, client TEXT NOT NULL,
        strategy TEXT NOT NULL, audit INTEGER NOT NULL, why TEXT NOT NULL, at REAL NOT NULL
    )
    """,
    "CREATE INDEX choices_of_model ON choices (model, audit)",
    "CREATE TABLE audits (model TEXT NOT NULL PRIMARY KEY, calls INTEGER NOT NULL)",
    """
    CREATE TABLE batches (
        id INTEGER PRIMARY KEY AUTOINCREMENT, model TEXT NOT NULL, client TEXT NOT NULL,
        options TEXT NOT NULL, created REAL NOT NULL, state TEXT NOT NULL
    )
    """,
    """
    CREATE TABLE batch_items (
        batch INTEGER NOT NULL, position INTEGER NOT NULL, image TEXT NOT NULL,
        state TEXT NOT NULL, message TEXT NOT NULL DEFAULT '',
        PRIMARY KEY (batch, image)
    )
    """,
    "CREATE INDEX batch_items_by_state ON batch_items (batch, state, position)",
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (_FIRST,)
SCHEMA_VERSION = len(MIGRATIONS)
APPLICATION_ID = 0x4D534862
"""``MSHb``: what SQLite keeps in the head of a file to say whose it is."""
