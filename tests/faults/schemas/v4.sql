PRAGMA page_size = 2048;
PRAGMA auto_vacuum = 2;
PRAGMA journal_mode = wal;
BEGIN;
CREATE TABLE pending (
        seq              INTEGER PRIMARY KEY,
        kind             TEXT    NOT NULL
                         CHECK (kind IN ('track', 'identify', 'page', 'screen', 'group')),
        lane             INTEGER NOT NULL,
        queued_ms        INTEGER NOT NULL,
        attempts         INTEGER NOT NULL DEFAULT 0 CHECK (attempts >= 0),
        failing_since_ms INTEGER CHECK ((failing_since_ms IS NULL) = (attempts = 0)),
        body             BLOB    NOT NULL
    , upstream TEXT NOT NULL DEFAULT '') STRICT
    ;
INSERT INTO pending VALUES (7, 'track', 1017122364508498303, 1780000420000, 3, 1780003240000, CAST('{"messageId":"event-7","event":"Item Sold","userId":"bob","timestamp":"2026-05-28T20:26:40.000Z","properties":{"name":"Käse ☕","price":1.1,"it''s":[true,null]}}' AS BLOB), '');
INSERT INTO pending VALUES (10, 'track', 1017122364508498303, 1780000600000, 1, 1780003420000, CAST('{"messageId":"event-10","event":"Item Sold","userId":"bob","timestamp":"2026-05-28T20:26:40.000Z","properties":{"name":"Käse ☕","price":1.1,"it''s":[true,null]}}' AS BLOB), '');
INSERT INTO pending VALUES (11, 'track', -937194938957779674, 1780000660000, 0, NULL, CAST('{"messageId":"event-11","event":"Item Sold","anonymousId":"guest-7","timestamp":"2026-05-28T20:26:40.000Z","properties":{"name":"Käse ☕","price":1.1,"it''s":[true,null]}}' AS BLOB), '');
INSERT INTO pending VALUES (12, 'track', -8213900885120934984, 1780000720000, 0, NULL, CAST('{"messageId":"event-12","event":"Item Sold","userId":"ann","timestamp":"2026-05-28T20:26:40.000Z","properties":{"name":"Käse ☕","price":1.1,"it''s":[true,null]}}' AS BLOB), '');
INSERT INTO pending VALUES (13, 'track', -8213900885120934984, 1780003480000, 0, NULL, CAST('{"messageId":"event-9","event":"Item Sold","userId":"ann","timestamp":"2026-05-28T20:26:40.000Z","properties":{"name":"Käse ☕","price":1.1,"it''s":[true,null]}}' AS BLOB), '');
INSERT INTO pending VALUES (14, 'track', 1017122364508498303, 1780000780000, 0, NULL, CAST('{"messageId":"event-13","event":"Item Sold","userId":"bob","timestamp":"2026-05-28T20:26:40.000Z","properties":{"name":"Käse ☕","price":1.1,"it''s":[true,null]}}' AS BLOB), '');
INSERT INTO pending VALUES (15, 'track', -937194938957779674, 1780000840000, 0, NULL, CAST('{"messageId":"event-14","event":"Item Sold","anonymousId":"guest-7","timestamp":"2026-05-28T20:26:40.000Z","properties":{"name":"Käse ☕","price":1.1,"it''s":[true,null]}}' AS BLOB), '');
INSERT INTO pending VALUES (16, 'track', -8213900885120934984, 1780000900000, 0, NULL, CAST('{"messageId":"event-15","event":"Item Sold","userId":"ann","timestamp":"2026-05-28T20:26:40.000Z","properties":{"name":"Käse ☕","price":1.1,"it''s":[true,null]}}' AS BLOB), '');
INSERT INTO pending VALUES (17, 'track', 1017122364508498303, 1780000960000, 0, NULL, CAST('{"messageId":"event-16","event":"Item Sold","userId":"bob","timestamp":"2026-05-28T20:26:40.000Z","properties":{"name":"Käse ☕","price":1.1,"it''s":[true,null]}}' AS BLOB), '');
INSERT INTO pending VALUES (21, 'track', -7484083599033864286, 1780003780000, 0, NULL, CAST('{"messageId":"event-20","event":"Item Sold","userId":"cid","timestamp":"2026-05-28T20:26:40.000Z","properties":{"name":"Käse ☕","price":1.1,"it''s":[true,null]}}' AS BLOB), '');
INSERT INTO pending VALUES (22, 'track', -7484083599033864286, 1780003840000, 0, NULL, CAST('{"messageId":"event-21","event":"Item Sold","userId":"cid","timestamp":"2026-05-28T20:26:40.000Z","properties":{"name":"Käse ☕","price":1.1,"it''s":[true,null]}}' AS BLOB), '');
CREATE TABLE dead (
        seq      INTEGER PRIMARY KEY,
        kind     TEXT    NOT NULL
                 CHECK (kind IN ('track', 'identify', 'page', 'screen', 'group')),
        lane     INTEGER NOT NULL,
        attempts INTEGER NOT NULL CHECK (attempts >= 0),
        reason   TEXT    NOT NULL CHECK (reason IN ('rejected', 'gave_up', 'expired')),
        status   INTEGER,
        answer   TEXT    NOT NULL,
        body     BLOB    NOT NULL
    , upstream TEXT NOT NULL DEFAULT '') STRICT
    ;
INSERT INTO dead VALUES (3, 'track', -8213900885120934984, 4, 'rejected', 400, '{"error":"it''s"}', CAST('{"messageId":"event-3","event":"Item Sold","userId":"ann","timestamp":"2026-05-28T20:26:40.000Z","properties":{"name":"Käse ☕","price":1.1,"it''s":[true,null]}}' AS BLOB), '');
INSERT INTO dead VALUES (4, 'track', 1017122364508498303, 5, 'gave_up', 500, '{"error":"it''s"}', CAST('{"messageId":"event-4","event":"Item Sold","userId":"bob","timestamp":"2026-05-28T20:26:40.000Z","properties":{"name":"Käse ☕","price":1.1,"it''s":[true,null]}}' AS BLOB), '');
INSERT INTO dead VALUES (5, 'track', -937194938957779674, 6, 'expired', NULL, '{"error":"it''s"}', CAST('{"messageId":"event-5","event":"Item Sold","anonymousId":"guest-7","timestamp":"2026-05-28T20:26:40.000Z","properties":{"name":"Käse ☕","price":1.1,"it''s":[true,null]}}' AS BLOB), '');
INSERT INTO dead VALUES (20, 'track', -7484083599033864286, 1, 'rejected', 400, 'no', CAST('{"messageId":"event-19","event":"Item Sold","userId":"cid","timestamp":"2026-05-28T20:26:40.000Z","properties":{"name":"Käse ☕","price":1.1,"it''s":[true,null]}}' AS BLOB), '');
CREATE TABLE ledger (
        id         INTEGER PRIMARY KEY CHECK (id = 1),
        last_seq   INTEGER NOT NULL DEFAULT 0 CHECK (last_seq >= 0),
        accepted   INTEGER NOT NULL DEFAULT 0,
        delivered  INTEGER NOT NULL DEFAULT 0 CHECK (delivered >= 0),
        pending    INTEGER NOT NULL DEFAULT 0 CHECK (pending >= 0),
        dead       INTEGER NOT NULL DEFAULT 0 CHECK (dead >= 0),
        discarded  INTEGER NOT NULL DEFAULT 0 CHECK (discarded >= 0),
        evicted    INTEGER NOT NULL DEFAULT 0 CHECK (evicted BETWEEN 0 AND discarded),
        duplicates INTEGER NOT NULL DEFAULT 0 CHECK (duplicates >= 0),
        conflicts  INTEGER NOT NULL DEFAULT 0 CHECK (conflicts BETWEEN 0 AND duplicates),
        paused     INTEGER NOT NULL DEFAULT 0 CHECK (paused IN (0, 1)), indexed_upto INTEGER NOT NULL DEFAULT 0
                 CHECK (indexed_upto BETWEEN 0 AND last_seq), paused_upstreams TEXT NOT NULL DEFAULT '',
        CHECK (accepted = delivered + pending + dead + discarded)
    ) STRICT
    ;
INSERT INTO ledger VALUES (1, 22, 21, 5, 11, 4, 1, 0, 2, 1, 0, 0, '');
CREATE TABLE known (
        id_hash INTEGER NOT NULL,
        seq     INTEGER NOT NULL,
        PRIMARY KEY (id_hash, seq)
    ) STRICT, WITHOUT ROWID
    ;
CREATE TABLE "event" (
        seq         INTEGER PRIMARY KEY,
        message_id  TEXT    NOT NULL,
        digest      BLOB    NOT NULL CHECK (length(digest) = 16),
        state       TEXT    NOT NULL CHECK (state IN ('pending', 'dead', 'delivered')),
        accepted_ms INTEGER NOT NULL,
        settled_ms  INTEGER CHECK ((settled_ms IS NULL) = (state = 'pending'))
    , upstream TEXT NOT NULL DEFAULT '', app TEXT NOT NULL DEFAULT '') STRICT
    ;
INSERT INTO event VALUES (1, 'event-1', X'd02587e8b5b9b502543f4c73d4df05f8', 'delivered', 1780000060000, 1780003060000, '', '');
INSERT INTO event VALUES (2, 'event-2', X'5f4a0b3eb9c679b96ba76655c6f2c906', 'delivered', 1780000120000, 1780003120000, '', '');
INSERT INTO event VALUES (3, 'event-3', X'9af531a918692afdde2c8d2720902122', 'dead', 1780000180000, 1780001320000, '', '');
INSERT INTO event VALUES (4, 'event-4', X'e93c36a28d908662665b3e66e46cc5d7', 'dead', 1780000240000, 1780001620000, '', '');
INSERT INTO event VALUES (5, 'event-5', X'a31253406e755ba88a32d2ff6f1b20fe', 'dead', 1780000300000, 1780001980000, '', '');
INSERT INTO event VALUES (7, 'event-7', X'10edabc5e34eb542443147dfdc96d6ab', 'pending', 1780000420000, NULL, '', '');
INSERT INTO event VALUES (8, 'event-8', X'580093754754004cafaeca74af634219', 'delivered', 1780000480000, 1780003180000, '', '');
INSERT INTO event VALUES (10, 'event-10', X'da5cfee2b49a41880c83a28ae5246dff', 'pending', 1780000600000, NULL, '', '');
INSERT INTO event VALUES (11, 'event-11', X'65e28a75d818bf3d164cdeeec1705185', 'pending', 1780000660000, NULL, '', '');
INSERT INTO event VALUES (12, 'event-12', X'412ba98908b6ca97b411d9d09992a06e', 'pending', 1780000720000, NULL, '', '');
INSERT INTO event VALUES (13, 'event-9', X'7bef138b7068a5ab60764bb6b49830a1', 'pending', 1780000540000, NULL, '', '');
INSERT INTO event VALUES (14, 'event-13', X'1365545b542771ad9ba3efa756534de9', 'pending', 1780000780000, NULL, '', '');
INSERT INTO event VALUES (15, 'event-14', X'7dbab7d005b7029d1723a441145ac5d2', 'pending', 1780000840000, NULL, '', '');
INSERT INTO event VALUES (16, 'event-15', X'abd889d9e2d6077a415d4b01ce1809a2', 'pending', 1780000900000, NULL, '', '');
INSERT INTO event VALUES (17, 'event-16', X'8755edc79744913445f711027d6ba5be', 'pending', 1780000960000, NULL, '', '');
INSERT INTO event VALUES (18, 'event-17', X'8a28c734306d9b7ae6b07e842be0c272', 'delivered', 1780003540000, 1780003600000, 'crm', '');
INSERT INTO event VALUES (19, 'event-18', X'14c6ef21b4186fe893526f0c13815d03', 'delivered', 1780003660000, 1780003900000, '', 'pos');
INSERT INTO event VALUES (20, 'event-19', X'50cb4e7d6f47d05aa25ddf17c9ec9447', 'dead', 1780003720000, 1780003960000, '', 'pos');
INSERT INTO event VALUES (21, 'event-20', X'38e2e30c6ba730f4325da128f25bccb2', 'pending', 1780003780000, NULL, '', 'pos');
INSERT INTO event VALUES (22, 'event-21', X'1d873b8afd3e7cad05b6ffeadf19177f', 'pending', 1780003840000, NULL, '', 'kiosk');
CREATE INDEX event_delivered ON event (settled_ms) WHERE state = 'delivered'
    ;
CREATE TABLE salvage (
        name      TEXT    PRIMARY KEY,
        state     TEXT    NOT NULL CHECK (state IN ('running', 'done', 'failed')),
        found_ms  INTEGER NOT NULL,
        floor     INTEGER NOT NULL CHECK (floor >= 0),
        pending   INTEGER NOT NULL DEFAULT 0 CHECK (pending >= 0),
        dead      INTEGER NOT NULL DEFAULT 0 CHECK (dead >= 0),
        delivered INTEGER NOT NULL DEFAULT 0 CHECK (delivered >= 0),
        lost      INTEGER NOT NULL DEFAULT 0 CHECK (lost >= 0)
    ) STRICT
    ;
CREATE INDEX pending_named ON pending (upstream, seq) WHERE upstream <> ''
    ;
CREATE TABLE app (
        name         TEXT    PRIMARY KEY,
        token_digest BLOB    CHECK (length(token_digest) = 32),
        created_ms   INTEGER NOT NULL,
        revoked_ms   INTEGER CHECK (revoked_ms IS NULL OR token_digest IS NOT NULL),
        accepted     INTEGER NOT NULL CHECK (accepted >= 0),
        delivered    INTEGER NOT NULL CHECK (delivered >= 0),
        pending      INTEGER NOT NULL CHECK (pending >= 0),
        dead         INTEGER NOT NULL CHECK (dead >= 0),
        discarded    INTEGER NOT NULL CHECK (discarded >= 0),
        body_bytes   INTEGER NOT NULL CHECK (body_bytes >= 0),
        CHECK (accepted = delivered + pending + dead + discarded)
    ) STRICT
    ;
INSERT INTO app VALUES ('pos', X'7160f8688035138fcbc9a6c8041949ebea0c0d21a1b1d063f839f38d5c2be8f9', 1780000000000, NULL, 3, 1, 1, 1, 0, 326);
INSERT INTO app VALUES ('kiosk', X'd99cff6fc8a2f1fbc39e1c8f4f9eb28d692c40900bbb3486b426a13da37b79a0', 1780000000000, 1780004020000, 1, 0, 1, 0, 0, 163);
PRAGMA application_id = 1416773991;
PRAGMA user_version = 4;
COMMIT;
