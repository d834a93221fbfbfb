"""What can still be read of a damaged outbox.

SQLite refuses a damaged database, or stops at the first bad page. This reads the file format itself
(https://sqlite.org/fileformat2.html): every row on an intact page is found, whatever is damaged
elsewhere. It only reads, in plain synchronous calls, and raises for no bytes whatsoever; a page
that the disk does not give counts as damaged. Memory grows with the pages (some 50 bytes each), not
with the bodies. `rescue` reads it back from a thread; `database` asks whether a log is broken.

    views    the files as pages: the database, overlaid with what its write-ahead log holds
    log      which frames of the write-ahead log count
    pages    one page of a table: its cells, and the record in a cell
    tree     which pages are in use, and which are free and hold only what once was
    rows     which table a record is a row of; whether a body is the one that was accepted
    scan     one pass over all pages: which leaves hold rows, and what leads to them
    survey   all rows in order of acceptance, and what became of each event

Where sources contradict each other, the one that loses no event is believed: an event may come
back that was evicted, or was settled without being remembered; one whose row says delivered does not.
"""

from agent.outbox.salvage.survey import Report, Survey, Survivor, survey, surviving
from agent.outbox.salvage.views import log_is_broken

__all__ = ["Report", "Survey", "Survivor", "log_is_broken", "survey", "surviving"]
