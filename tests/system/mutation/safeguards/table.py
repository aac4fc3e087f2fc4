"""The safeguards, and which tests miss each of them. Read from top to bottom: events, keys, money, stock, locks, sagas,
calls between processes.

An entry takes away one safeguard, by hand, as an engineer might who does not know what it is for. Where two cover each
other, so that nothing happens while one of them is left, the entry takes both, and says so. `red` are the tests that
must fail then. `green` is a test of the same part that does well without: if it fails as well, the code was broken, and
the safeguard proves nothing.
"""

from __future__ import annotations

from typing import Final

import msgspec


class Edit(msgspec.Struct, frozen=True):
    """`old` stands in `file` exactly once."""

    file: str
    old: str
    new: str


class Safeguard(msgspec.Struct, frozen=True):
    """What is taken away, and what is missed. Tests are node ids of pytest."""

    name: str
    removed: str
    edits: tuple[Edit, ...]
    red: tuple[str, ...]
    green: str


DATABASE: Final = "mercato/chassis/postgres/database.py"
CONNECTIONS: Final = "mercato/chassis/postgres/connections.py"
OUTBOX: Final = "mercato/chassis/messaging/outbox.py"
CONSUMERS: Final = "mercato/chassis/messaging/consumers.py"
PARKING: Final = "mercato/chassis/messaging/parking.py"
SAGA: Final = "mercato/chassis/sagas/store.py"
TRUST: Final = "mercato/chassis/rpc/trust.py"
RETRYING: Final = "mercato/chassis/rpc/retrying.py"
BREAKER: Final = "mercato/chassis/rpc/circuit_breaker.py"
SAGA_TABLES_FOR_TESTS: Final = "tests/chassis/sagas/migrations_with_sagas/0001_sagas.py"
KEYED_BATCH: Final = "mercato/chassis/idempotency/batch.py"
KEYS: Final = "mercato/chassis/idempotency/keys.py"
PLACING: Final = "mercato/services/orders/placing.py"
ORDERS_TABLES: Final = "mercato/services/orders/migrations/0001_orders.py"
CHARGING: Final = "mercato/services/payments/charging.py"
RECONCILING: Final = "mercato/services/payments/reconciling.py"
PAYMENTS_RULES: Final = "mercato/services/payments/rules.py"
PAYMENTS_STORE: Final = "mercato/services/payments/store.py"
PAYMENTS_TABLES: Final = "mercato/services/payments/migrations/0001_payments.py"
STOCK_RULES: Final = "mercato/services/inventory/rules.py"
STOCK: Final = "mercato/services/inventory/store.py"
STOCK_BATCHES: Final = "mercato/services/inventory/fast_path.py"
STOCK_TABLES: Final = "mercato/services/inventory/migrations/0001_stock.py"

OF_DATABASE: Final = "tests/chassis/postgres/test_database.py"
OF_EVENTS: Final = "tests/chassis/messaging/test_events.py"
OF_STOPS: Final = "tests/chassis/messaging/test_events_stopped.py"
OF_COMMITS: Final = "tests/chassis/postgres/test_commits.py"
OF_CONSUMERS: Final = "tests/chassis/messaging/test_consumers.py"
OF_SAGA: Final = "tests/chassis/sagas/test_sagas.py"
OF_TRUST: Final = "tests/chassis/rpc/test_trust.py"
OF_RETRIES: Final = "tests/chassis/rpc/test_retrying.py"
OF_BREAKERS: Final = "tests/chassis/rpc/test_circuit_breaker.py"
OF_KEYS: Final = "tests/chassis/idempotency/test_keys.py"
OF_PLACING: Final = "tests/services/orders/test_placing.py"
OF_ORDER_KEYS: Final = "tests/services/orders/test_keys.py"
OF_KEYS_AT_THE_EDGE: Final = "tests/gateway/test_idempotency_key.py"
OF_CHARGING: Final = "tests/services/payments/test_charging.py"
OF_CHARGE: Final = "tests/services/payments/test_charge.py"
OF_RECOVERY: Final = "tests/services/payments/test_recovery.py"
OF_RECONCILING: Final = "tests/services/payments/test_reconciling.py"
OF_RESERVING: Final = "tests/services/inventory/test_reserving.py"
OF_CONTENTION: Final = "tests/services/inventory/test_contention.py"

# What more than one entry takes away.

CLAIM: Final = Edit(
    KEYS,
    "    return {(r.principal, r.key) for r in rows}\n",
    "    return {w.identity for w in wanted}\n",
)
UNIQUE_KEY: Final = Edit(
    ORDERS_TABLES,
    "CREATE UNIQUE INDEX orders_principal_idempotency_key",
    "CREATE INDEX orders_principal_idempotency_key",
)
GUARD_OF_LEVELS: Final = Edit(STOCK, "           AND l.on_hand - l.reserved >= d.reserved - d.on_hand\n", "")
GUARD_OF_BATCHES: Final = Edit(
    STOCK_BATCHES,
    "           AND on_hand - reserved >= $9[width_bucket(product_id, $8)]\n           AND on_hand >= $11",
    "           AND on_hand >= $11",
)
CHECK_OF_LEVELS: Final = Edit(
    STOCK_TABLES, "CONSTRAINT levels_reserved_within_on_hand CHECK (reserved BETWEEN 0 AND on_hand),", ""
)

LOCK_OF_LEVELS: Final = Edit(
    STOCK,
    "         ORDER BY product_id\n           FOR NO KEY UPDATE\n",
    "         ORDER BY product_id\n",
)
LAST_PIECE: Final = f"{OF_CONTENTION}::test_two_concurrent_reservations_of_the_last_piece_do_not_oversell"
OTHER_ORDER: Final = f"{OF_RESERVING}::test_a_request_of_another_order_with_the_same_id_is_refused_and_changes_nothing"
OPPOSITE_LOCKS: Final = f"{OF_CONTENTION}::test_batches_that_name_the_same_rows_in_opposite_orders_do_not_deadlock"

SAFEGUARDS: Final[tuple[Safeguard, ...]] = (
    # --------------------------------------------------------------------------------------------------------- events
    Safeguard(
        "cursor",
        "A consumer moves its cursor wherever it is: of two processes that read the same rows, both have the effects.",
        (
            Edit(
                PARKING,
                "         WHERE consumer = $1 AND source = $2 AND position = $3\n        RETURNING EXISTS",
                "         WHERE consumer = $1 AND source = $2 AND $3::bigint IS NOT NULL\n        RETURNING EXISTS",
            ),
        ),
        red=(
            f"{OF_CONSUMERS}::test_a_cursor_that_another_process_has_moved_is_not_moved_again",
            f"{OF_CONSUMERS}::test_two_processes_have_each_effect_once_and_in_order",
        ),
        green=f"{OF_CONSUMERS}::test_every_consumer_gets_what_it_wants_in_order",
    ),
    Safeguard(
        "lock-until-commit",
        "The ids of outbox rows are taken without the lock: a later one may commit first, and the earlier is missed.",
        (
            Edit(
                CONNECTIONS,
                " SELECT %s FROM pg_advisory_xact_lock({OUTBOX_LOCK})",
                " SELECT %s WHERE {OUTBOX_LOCK} > 0",
            ),
        ),
        red=(f"{OF_EVENTS}::test_a_transaction_waits_for_the_commit_of_the_one_that_writes_events",),
        green=f"{OF_EVENTS}::test_data_of_any_text_is_written_as_it_is",
    ),
    Safeguard(
        "events-with-commit",
        "Events and COMMIT are two messages: a process that is stopped between them holds up every writer.",
        (
            Edit(
                CONNECTIONS,
                "        return f\"SET LOCAL lock_timeout = '{OUTBOX_LOCK_SECONDS:.0f}s'; {writes}; {end}\"\n",
                '        await connection.execute(f"SET LOCAL lock_timeout = 0; {writes}")\n        return end\n',
            ),
        ),
        red=(f"{OF_STOPS}::test_a_process_that_is_stopped_while_it_commits_holds_up_no_other",),
        green=f"{OF_EVENTS}::test_data_of_any_text_is_written_as_it_is",
    ),
    Safeguard(
        "commit-is-not-cancelled",
        "A COMMIT that waits for a standby is cancelled: others read what a fail-over takes away, and acknowledge it.",
        (Edit(CONNECTIONS, "        if self._is_committing:\n", "        if False:\n"),),
        red=(f"{OF_COMMITS}::test_a_commit_whose_caller_has_left_stays_unseen",),
        green=f"{OF_COMMITS}::test_a_lock_of_the_outbox_that_is_not_free_in_time_is_no_commit",
    ),
    Safeguard(
        "stalled-commit",
        "Transactions go on while a COMMIT waits for a standby that does not answer: each keeps one more session of "
        "the server.",
        (Edit(DATABASE, "if writes and self._connections.are_commits_stalled:", "if False:"),),
        red=(f"{OF_COMMITS}::test_while_a_commit_is_stalled_no_transaction_begins_and_reads_work",),
        green=f"{OF_COMMITS}::test_once_no_commit_is_stalled_transactions_begin_again",
    ),
    Safeguard(
        "place-in-row",
        "The cursor counts rows: a consumer that dies among the events of a row gets them all once more.",
        (Edit(CONSUMERS, "        to = Cursor(event.id, event.at)\n", "        to = cursor\n"),),
        red=(f"{OF_CONSUMERS}::test_a_row_of_many_events_that_is_processed_one_by_one_repeats_nothing_after_a_crash",),
        green=f"{OF_CONSUMERS}::test_every_consumer_gets_what_it_wants_in_order",
    ),
    Safeguard(
        "park-against-retry",
        "A retry does not wait for a batch that parks an event behind the one it removes: that event waits for ever.",
        (
            Edit(
                CONSUMERS,
                "                await parking.lock_cursor(tx, self.key)\n                if not await parking.remove(",
                "                if not await parking.remove(",
            ),
        ),
        red=(f"{OF_CONSUMERS}::test_an_event_is_not_parked_behind_one_that_a_retry_has_just_removed",),
        green=f"{OF_CONSUMERS}::test_an_event_that_is_processed_at_a_later_try_is_not_dead",
    ),
    Safeguard(
        "restored-source",
        "A log does not compare the row in which a consumer stands: what a restored one has instead is skipped.",
        (Edit(OUTBOX, "            is_known = kept[0].at == request.at\n", "            is_known = True\n"),),
        red=(
            f"{OF_EVENTS}::test_a_log_that_was_restored_behind_a_position_refuses_it",
            f"{OF_CONSUMERS}::test_a_source_that_was_restored_behind_the_cursor_is_reported_and_nothing_is_skipped",
        ),
        green=f"{OF_EVENTS}::test_the_log_gives_what_is_behind_a_position",
    ),
    Safeguard(
        "outbox",
        "The event of a new order is written after the order, in a transaction of its own.",
        (
            Edit(PLACING, "            await store.emit_placed(tx, placed)\n", ""),
            Edit(
                PLACING,
                '        await faults.point("orders.place.after_commit")\n',
                '        await faults.point("orders.place.after_commit")\n'
                "        async with self._database.transaction() as tx:\n"
                "            await store.emit_placed(tx, placed)\n",
            ),
        ),
        red=(
            f"{OF_PLACING}::test_a_committed_order_is_emitted_and_continued_after_a_crash_right_after_the_commit[local]",
        ),
        green=f"{OF_PLACING}::test_the_first_entry_of_the_history_says_who_placed_it[local]",
    ),
    # ----------------------------------------------------------------------------------------------------------- keys
    Safeguard(
        "claim",
        "A request that finds its key taken goes on as if the key were free.",
        (CLAIM,),
        red=(f"{OF_KEYS}::test_a_concurrent_duplicate_waits_and_gets_the_answer_of_the_first",),
        green=f"{OF_KEYS}::test_when_the_first_request_rolls_back_its_duplicate_runs",
    ),
    Safeguard(
        "fingerprint",
        "A key is answered whatever the request is.",
        (Edit(KEYS, "        if self.fingerprint != fingerprint:\n", "        if self.fingerprint is None:\n"),),
        red=(f"{OF_KEYS}::test_another_request_with_a_used_key_is_refused_at_its_position",),
        green=f"{OF_KEYS}::test_when_the_first_request_rolls_back_its_duplicate_runs",
    ),
    Safeguard(
        "unique-key",
        "Two orders may have one key.",
        (UNIQUE_KEY,),
        red=(f"{OF_ORDER_KEYS}::test_a_concurrent_duplicate_waits_for_the_first_and_gets_its_answer[local]",),
        green=f"{OF_ORDER_KEYS}::test_a_second_place_with_the_same_key_gets_the_first_answer[local]",
    ),
    Safeguard(
        "fingerprint-of-orders",
        "The same of an order, which is the answer of its key for ever.",
        (Edit(KEYED_BATCH, "        is_same = self.keyed.fingerprint == fingerprint\n", "        is_same = True\n"),),
        red=(
            f"{OF_ORDER_KEYS}::test_the_same_key_with_another_request_is_refused[local]",
            f"{OF_KEYS_AT_THE_EDGE}::test_the_key_with_another_body_is_refused_and_nothing_runs",
        ),
        green=f"{OF_ORDER_KEYS}::test_a_second_place_with_the_same_key_gets_the_first_answer[local]",
    ),
    # ---------------------------------------------------------------------------------------------------------- money
    Safeguard(
        "live-payment",
        "An order may have two live payments.",
        (
            Edit(
                PAYMENTS_TABLES,
                "CREATE UNIQUE INDEX payments_one_live_an_order",
                "CREATE INDEX payments_one_live_an_order",
            ),
        ),
        red=(
            f"{OF_CHARGING}::test_an_order_has_one_live_payment[local]",
            f"{OF_CHARGING}::test_two_attempts_at_the_same_moment_leave_one_payment[local]",
            f"{OF_CHARGE}::test_an_order_has_one_live_payment[local]",
            f"{OF_CHARGE}::test_two_attempts_at_the_same_moment_leave_one_payment[local]",
        ),
        green=f"{OF_CHARGING}::test_an_attempt_is_authorized_once[local]",
    ),
    Safeguard(
        "provider-key",
        "The provider is called with a new key each time. (`key_of` alone is no lock: the stored key is what is sent.)",
        (
            Edit(CHARGING, "import asyncio\n", "import asyncio\nimport secrets\n"),
            Edit(CHARGING, "key=self.intent.key,", 'key=f"{self.intent.key}:{secrets.token_hex(8)}",'),
        ),
        red=(
            f"{OF_RECOVERY}::test_a_process_that_hangs_before_it_records_an_answer_is_passed[local]",
            f"{OF_CHARGE}::test_one_attempt_from_two_processes_at_once_is_charged_once[local]",
        ),
        green=f"{OF_CHARGING}::test_an_authorized_payment_holds_the_amount_and_takes_nothing[local]",
    ),
    Safeguard(
        "intent-before-call",
        "The provider is called in the transaction of the intents: before they are committed.",
        (
            Edit(
                CHARGING,
                '            await faults.point("payments.charge.before_intent_commit")\n',
                "            outside = handler_run.set(None)\n"
                "            calls = [_first_call(opened[o.order_id], o, k) for o, k in zip(openings, keys)]\n"
                '            await self.call_provider("charge", calls)\n'
                "            handler_run.reset(outside)\n"
                '            await faults.point("payments.charge.before_intent_commit")\n',
            ),
            Edit(
                CHARGING,
                "from mercato.chassis.messaging.events import Outgoing\n",
                "from mercato.chassis.messaging.events import Outgoing\n"
                "from mercato.chassis.contract import handler_run\n",
            ),
        ),
        red=(
            f"{OF_CHARGE}::test_a_process_that_dies_before_its_intent_is_committed_has_not_called_the_provider[local]",
        ),
        green=f"{OF_CHARGING}::test_an_authorized_payment_holds_the_amount_and_takes_nothing[local]",
    ),
    Safeguard(
        "settled-once",
        "A charge is recorded although another process has recorded it.",
        (
            Edit(
                PAYMENTS_STORE,
                "             WHERE p.ctid = k.tid AND p.status = 'pending'\n               AND (SELECT i.kind FROM",
                "             WHERE p.ctid = k.tid AND (SELECT coalesce(max(i.kind), 'charge') FROM",
            ),
        ),
        red=(f"{OF_RECOVERY}::test_a_charge_that_is_recorded_late_changes_nothing[local]",),
        green=f"{OF_CHARGE}::test_a_charged_payment_is_captured_by_one_operation[local]",
    ),
    Safeguard(
        "one-charge-a-payment",
        "A payment that began with a charge may be authorized as well.",
        (
            Edit(
                PAYMENTS_RULES,
                '    begun: list[OperationKind] = [kind for kind in OPENING if (kind, "") in known]\n',
                "    begun: list[OperationKind] = []\n",
            ),
            Edit(
                PAYMENTS_TABLES,
                "CONSTRAINT intents_pkey PRIMARY KEY (payment_id, reference),",
                "CONSTRAINT intents_pkey PRIMARY KEY (payment_id, reference, kind),",
            ),
        ),
        red=(
            f"{OF_CHARGE}::test_an_authorize_of_an_open_charge_settles_the_charge[local]",
            f"{OF_CHARGE}::test_a_charge_settles_an_open_authorize_first[local]",
        ),
        green=f"{OF_CHARGE}::test_a_charged_payment_is_captured_by_one_operation[local]",
    ),
    Safeguard(
        "order-nonce",
        "A payment is found by the id of its order alone.",
        (Edit(CHARGING, "elif payment.nonce != request.nonce:", "elif False:"),),
        red=(f"{OF_CHARGING}::test_a_payment_of_another_order_with_this_id_is_neither_used_nor_changed[local]",),
        green=f"{OF_CHARGING}::test_an_attempt_is_authorized_once[local]",
    ),
    Safeguard(
        "nonce-in-the-key",
        "The key for the provider is made of ids alone.",
        (Edit(PAYMENTS_RULES, "{order_id}-{nonce:016x}-{attempt}", "{order_id}-{0:016x}-{attempt}"),),
        red=(f"{OF_CHARGING}::test_the_nonce_is_in_the_key[local-9223372036854775807]",),
        green=f"{OF_CHARGE}::test_a_repeated_charge_answers_with_the_payment_as_it_is[local]",
    ),
    Safeguard(
        "bank-says-yes",
        "The reconciliation does not record what the bank has done.",
        (Edit(RECONCILING, "        if results:\n", "        if False:\n"),),
        red=(f"{OF_RECONCILING}::test_what_the_bank_has_done_is_recorded[local]",),
        green=f"{OF_RECONCILING}::test_operations_that_agree_with_the_statement_have_no_mismatch[local]",
    ),
    Safeguard(
        "give-back",
        "The reconciliation does not void an authorization of a payment that is closed.",
        (Edit(RECONCILING, "        if charges:\n", "        if False:\n"),),
        red=(f"{OF_RECONCILING}::test_an_authorization_of_a_failed_or_voided_payment_is_voided[local-voided]",),
        green=f"{OF_RECONCILING}::test_operations_that_agree_with_the_statement_have_no_mismatch[local]",
    ),
    # ---------------------------------------------------------------------------------------------------------- stock
    Safeguard(
        "stock-decision",
        "Levels are not checked before the UPDATE: nothing is oversold, but buyers get an internal failure.",
        (
            Edit(
                STOCK_RULES,
                "            if (available := self._may_be_held(line.product_id)) < line.quantity\n",
                "            if (available := self._may_be_held(line.product_id)) < 0\n",
            ),
        ),
        red=(f"{OF_RESERVING}::test_all_lines_or_none[local]",),
        green=f"{OF_RESERVING}::test_asked_again_it_answers_the_same_and_takes_nothing[local]",
    ),
    Safeguard(
        "stock-guard",
        "The UPDATE of levels takes pieces that are not available; what is left is the CHECK, which only fails.",
        (GUARD_OF_LEVELS,),
        red=(
            f"{OF_CONTENTION}::test_pieces_are_taken_only_where_there_are_so_many_whatever_the_caller_believes[local]",
        ),
        green=f"{OF_RESERVING}::test_all_lines_or_none[local]",
    ),
    Safeguard(
        "stock-guard-of-batches",
        "The statement for a whole batch takes pieces that are not available; what is left is the CHECK.",
        (GUARD_OF_BATCHES,),
        red=(f"{LAST_PIECE}[local-as a whole]",),
        green=f"{OF_RESERVING}::test_all_lines_or_none[local]",
    ),
    Safeguard(
        "stock-check",
        "The table lets more be reserved than there is.",
        (CHECK_OF_LEVELS,),
        red=(f"{OF_CONTENTION}::test_the_check_of_levels_is_a_lock_of_its_own[local]",),
        green=f"{OF_RESERVING}::test_all_lines_or_none[local]",
    ),
    Safeguard(
        "stock-lock",
        "Levels are not locked while each order of a batch is decided: what was read there is not true any more.",
        (LOCK_OF_LEVELS,),
        red=(f"{LAST_PIECE}[local-one by one]",),
        green=f"{OF_RESERVING}::test_all_lines_or_none[local]",
    ),
    Safeguard(
        "last-piece",
        "Lock, guards and CHECK at once: with one of them left, the last piece is never promised twice.",
        (LOCK_OF_LEVELS, GUARD_OF_LEVELS, GUARD_OF_BATCHES, CHECK_OF_LEVELS),
        red=(f"{LAST_PIECE}[local-as a whole]",),
        green=f"{OF_RESERVING}::test_all_lines_or_none[local]",
    ),
    Safeguard(
        "stock-nonce",
        "A request about another order that has the same id is taken for one about this. (Batch and one by one.)",
        (
            Edit(STOCK_BATCHES, " AND r.nonce = w.nonce", ""),
            Edit(
                STOCK_RULES,
                "        if reservation is not None and reservation.nonce != nonce:\n",
                "        if False:\n",
            ),
        ),
        red=(f"{OTHER_ORDER}[local-False-held]", f"{OTHER_ORDER}[local-False-committed]"),
        green=f"{OF_RESERVING}::test_all_lines_or_none[local]",
    ),
    # ---------------------------------------------------------------------------------------------------------- locks
    Safeguard(
        "order-of-keys",
        "Idempotency keys are claimed in the order in which they are named.",
        (Edit(KEYS, "         ORDER BY w.principal, w.key\n", ""),),
        red=(f"{OF_KEYS}::test_batches_with_the_same_keys_in_other_orders_do_not_deadlock",),
        green=f"{OF_KEYS}::test_a_concurrent_duplicate_waits_and_gets_the_answer_of_the_first",
    ),
    Safeguard(
        "order-of-reservations",
        "Reservations are locked in the order in which they are named.",
        (
            Edit(
                STOCK,
                "         ORDER BY order_id\n           FOR NO KEY UPDATE\n",
                "         ORDER BY array_position($1::bigint[], order_id)\n           FOR NO KEY UPDATE\n",
            ),
        ),
        red=(f"{OPPOSITE_LOCKS}[local-reservations]",),
        green=f"{OPPOSITE_LOCKS}[local-levels]",
    ),
    Safeguard(
        "order-of-batches",
        "The statement for a whole batch locks reservations in the order in which they are named.",
        (Edit(STOCK_BATCHES, " AS w (order_id, nonce) ORDER BY order_id) w", " AS w (order_id, nonce)) w"),),
        red=(f"{OPPOSITE_LOCKS}[local-reservations of a batch]",),
        green=f"{OPPOSITE_LOCKS}[local-levels of a batch]",
    ),
    Safeguard(
        "order-of-levels",
        "Levels are locked in the order in which they are named.",
        (
            Edit(
                STOCK,
                "         ORDER BY product_id\n           FOR NO KEY UPDATE\n",
                "         ORDER BY array_position($1::bigint[], product_id)\n           FOR NO KEY UPDATE\n",
            ),
        ),
        red=(f"{OPPOSITE_LOCKS}[local-levels]",),
        green=f"{OPPOSITE_LOCKS}[local-reservations]",
    ),
    Safeguard(
        "order-of-sagas",
        "Sagas are locked in the order in which they are named.",
        (Edit(SAGA, "    ordered = sorted(saved, key=lambda each: each[0].key)\n", "    ordered = list(saved)\n"),),
        red=(f"{OF_SAGA}::test_batches_that_meet_in_the_middle_do_not_wait_for_each_other[updated]",),
        green=f"{OF_SAGA}::test_sagas_of_a_batch_that_were_not_taken_over_are_saved",
    ),
    # ---------------------------------------------------------------------------------------------------------- sagas
    Safeguard(
        "epoch",
        "A saga is saved, or finished, by a driver from which it was taken over.",
        (
            Edit(
                SAGA,
                "         WHERE s.ctid = w.place AND s.epoch = w.epoch AND s.version = w.version\n"
                "        RETURNING s.subject_id, s.kind, s.reference, s.epoch\n"
                '        """,\n        [s.subject_id for s in ended],\n',
                "         WHERE s.ctid = w.place AND s.version = w.version\n"
                "        RETURNING s.subject_id, s.kind, s.reference, s.epoch\n"
                '        """,\n        [s.subject_id for s in ended],\n',
            ),
            Edit(
                SAGA,
                "         WHERE s.ctid = w.place AND s.epoch = w.epoch AND s.version = w.version\n"
                "        RETURNING s.subject_id, s.kind, s.reference, s.epoch\n"
                '        """,\n        [s.subject_id for s, _ in going_on],\n',
                "         WHERE s.ctid = w.place AND s.version = w.version\n"
                "        RETURNING s.subject_id, s.kind, s.reference, s.epoch\n"
                '        """,\n        [s.subject_id for s, _ in going_on],\n',
            ),
        ),
        red=(f"{OF_SAGA}::test_a_driver_of_another_epoch_is_refused_though_the_version_is_right",),
        green=f"{OF_SAGA}::test_a_save_whose_commit_has_an_unknown_outcome_is_not_repeated[False]",
    ),
    Safeguard(
        "epoch-sequence",
        "Each row of a saga counts its epochs from 1: one that is made again repeats them.",
        (
            Edit(
                SAGA_TABLES_FOR_TESTS,
                "epoch bigint NOT NULL DEFAULT nextval('saga_epochs'),",
                "epoch bigint NOT NULL DEFAULT 1,",
            ),
        ),
        red=(f"{OF_SAGA}::test_a_row_that_is_inserted_again_has_a_new_epoch",),
        green=f"{OF_SAGA}::test_a_save_whose_commit_has_an_unknown_outcome_is_not_repeated[False]",
    ),
    Safeguard(
        "version",
        "A saga is saved once more by a driver that did not receive the answer.",
        (
            Edit(
                SAGA,
                "         WHERE s.ctid = w.place AND s.epoch = w.epoch AND s.version = w.version\n"
                "        RETURNING s.subject_id, s.kind, s.reference, s.epoch\n"
                '        """,\n        [s.subject_id for s, _ in going_on],\n',
                "         WHERE s.ctid = w.place AND s.epoch = w.epoch\n"
                "        RETURNING s.subject_id, s.kind, s.reference, s.epoch\n"
                '        """,\n        [s.subject_id for s, _ in going_on],\n',
            ),
        ),
        red=(f"{OF_SAGA}::test_a_save_whose_commit_has_an_unknown_outcome_is_not_repeated[False]",),
        green=f"{OF_SAGA}::test_a_driver_of_another_epoch_is_refused_though_the_version_is_right",
    ),
    # ------------------------------------------------------------------------------------------- between processes
    Safeguard(
        "audience",
        "A token for one service is good for every other.",
        (
            Edit(
                TRUST,
                "            if claims.aud != service or service not in self._services:\n",
                "            if service not in self._services:\n",
            ),
        ),
        red=(f"{OF_TRUST}::test_a_token_for_another_service_is_refused",),
        green=f"{OF_TRUST}::test_a_call_without_a_token_is_refused[None]",
    ),
    Safeguard(
        "grant",
        "A service may call every operation.",
        (Edit(TRUST, "        if grant is None or name not in grant.operations:\n", "        if grant is None:\n"),),
        red=(f"{OF_TRUST}::test_an_operation_that_a_service_does_not_call_is_refused[gateway]",),
        green=f"{OF_TRUST}::test_the_gateway_does_not_speak_for_the_shop",
    ),
    Safeguard(
        "role",
        "The gateway may speak for the shop itself.",
        (Edit(TRUST, "        if grant.roles is None:\n            return {}\n", "        return {}\n"),),
        red=(f"{OF_TRUST}::test_the_gateway_does_not_speak_for_the_shop",),
        green=f"{OF_TRUST}::test_what_a_service_is_known_to_call_is_not_refused",
    ),
    Safeguard(
        "retry-budget",
        "All that fails is sent again, however much it is.",
        (Edit(RETRYING, "        if requests > self.left:\n            return False\n", ""),),
        red=(f"{OF_RETRIES}::test_a_service_that_is_down_gets_a_tenth_more_than_its_load",),
        green=f"{OF_RETRIES}::test_after_the_last_attempt_the_failure_stands",
    ),
    Safeguard(
        "retry-class",
        "What may not come again is sent again.",
        (Edit(RETRYING, "if operation.repeatable(requests[i]) and contexts[i]", "if contexts[i]"),),
        red=(f"{OF_RETRIES}::test_a_request_that_must_not_be_repeated_is_sent_once[never]",),
        green=f"{OF_RETRIES}::test_a_request_with_a_key_is_sent_again",
    ),
    Safeguard(
        "breaker-classes",
        "Reads and writes of a service share a circuit breaker.",
        (Edit(BREAKER, "cls.READS if operation.retry is Retry.SAFE else cls.WRITES", "cls.READS"),),
        red=(f"{OF_BREAKERS}::test_slow_reads_stop_reads_and_no_writes",),
        green=f"{OF_BREAKERS}::test_a_batch_is_one_permit",
    ),
    Safeguard(
        "connection-for-writes",
        "Reads may take all connections of a service.",
        (Edit(DATABASE, "WRITES_RESERVED: Final = 1\n", "WRITES_RESERVED: Final = 0\n"),),
        red=(f"{OF_DATABASE}::TestTurns::test_slow_reads_leave_a_connection_for_writes",),
        green=f"{OF_DATABASE}::TestStatements::test_rows_values_and_counts",
    ),
)
