"""The safeguards, and which tests miss each of them. Read from top to bottom: events, keys, money, stock, locks, sagas.

An entry takes away one safeguard, by hand, as somebody might who does not know what it is for. Where two cover each
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


INBOX: Final = "mercato/chassis/inbox.py"
RELAY: Final = "mercato/chassis/relay.py"
SAGA: Final = "mercato/chassis/saga.py"
KEYS: Final = "mercato/chassis/idempotency.py"
PLACING: Final = "mercato/services/orders/placing.py"
ORDERS_TABLES: Final = "mercato/services/orders/migrations/0001_orders.py"
CHARGING: Final = "mercato/services/payments/charging.py"
RECONCILING: Final = "mercato/services/payments/reconciling.py"
PAYMENTS_TABLES: Final = "mercato/services/payments/migrations/0001_payments.py"
STOCK_RULES: Final = "mercato/services/inventory/rules.py"
STOCK: Final = "mercato/services/inventory/store.py"
STOCK_TABLES: Final = "mercato/services/inventory/migrations/0001_stock.py"

OF_RELAY: Final = "tests/chassis/test_relay.py"
OF_SAGA: Final = "tests/chassis/test_saga.py"
OF_KEYS: Final = "tests/chassis/test_idempotency.py"
OF_PLACING: Final = "tests/services/orders/test_placing.py"
OF_ORDER_KEYS: Final = "tests/services/orders/test_keys.py"
OF_KEYS_AT_THE_EDGE: Final = "tests/gateway/test_idempotency_key.py"
OF_CHARGING: Final = "tests/services/payments/test_charging.py"
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
GUARD_OF_LEVELS: Final = Edit(STOCK, "           AND l.on_hand - l.reserved >= s.reserved - s.on_hand\n", "")
CHECK_OF_LEVELS: Final = Edit(
    STOCK_TABLES, "CONSTRAINT levels_reserved_within_on_hand CHECK (reserved BETWEEN 0 AND on_hand),", ""
)

LOCK_OF_LEVELS: Final = Edit(
    STOCK,
    "         ORDER BY product_id\n           FOR NO KEY UPDATE\n",
    "         ORDER BY product_id\n",
)
LAST_PIECE: Final = (
    f"{OF_CONTENTION}::test_two_who_come_for_the_last_piece_at_the_same_moment_are_not_both_promised_it[local]"
)
OPPOSITE_LOCKS: Final = f"{OF_CONTENTION}::test_who_names_the_same_rows_the_other_way_round_waits_and_does_not_deadlock"

SAFEGUARDS: Final[tuple[Safeguard, ...]] = (
    # --------------------------------------------------------------------------------------------------------- events
    Safeguard(
        "inbox",
        "A consumer takes an event although its inbox row was there.",
        (Edit(INBOX, "    return [event for event in events if event.id in entered]\n", "    return list(events)\n"),),
        red=(
            f"{OF_RELAY}::test_an_event_that_is_delivered_twice_has_one_effect",
            f"{OF_RELAY}::test_a_commit_whose_answer_was_lost_has_one_effect",
        ),
        green=f"{OF_RELAY}::test_every_consumer_gets_what_it_wants_in_order",
    ),
    Safeguard(
        "ack-consumer",
        "A consumer says `taken` before its effect is committed.",
        (
            Edit(
                INBOX,
                "        try:\n            await self._take([delivery.event])\n",
                "        progress.note(delivery, TAKEN)\n"
                "        try:\n            await self._take([delivery.event])\n",
            ),
        ),
        red=(f"{OF_RELAY}::test_taken_is_said_after_the_commit",),
        green=f"{OF_RELAY}::test_every_consumer_gets_what_it_wants_in_order",
    ),
    Safeguard(
        "ack-relay",
        "The relay marks events published before it delivers them.",
        (
            Edit(
                RELAY,
                "        await faults.point(BEFORE_DELIVER)\n        debts = await _all(",
                "        await self._mark(events, [])\n"
                "        await faults.point(BEFORE_DELIVER)\n        debts = await _all(",
            ),
        ),
        red=(
            f"{OF_RELAY}::test_a_relay_that_dies_at_any_point_leaves_all_to_the_next[relay.before_deliver-fresh]",
            f"{OF_RELAY}::test_a_relay_that_dies_at_any_point_leaves_all_to_the_next[inbox.before_commit-fresh]",
        ),
        green=f"{OF_RELAY}::test_a_relay_begins_with_a_lease_and_gives_it_back",
    ),
    Safeguard(
        "outbox",
        "The event of a new order is written after the order, in a transaction of its own.",
        (
            Edit(PLACING, "    await store.tell_placed(tx, [answer.order for answer in answers])\n", ""),
            Edit(
                PLACING,
                '        await faults.point("orders.place.after_commit")\n',
                '        await faults.point("orders.place.after_commit")\n'
                "        async with self._database.transaction() as tx:\n"
                "            await store.tell_placed(tx, [answer.order for answer in answers])\n",
            ),
        ),
        red=(f"{OF_PLACING}::test_what_is_committed_is_told_and_carried_on_though_the_power_fails_right_after[local]",),
        green=f"{OF_PLACING}::test_the_first_entry_of_the_history_says_who_placed_it[local]",
    ),
    # ----------------------------------------------------------------------------------------------------------- keys
    Safeguard(
        "claim",
        "Who finds a key taken goes on as if it were its own.",
        (CLAIM,),
        red=(f"{OF_KEYS}::test_a_twin_waits_and_hears_the_answer_of_the_first",),
        green=f"{OF_KEYS}::test_when_the_first_rolls_back_the_twin_does_it",
    ),
    Safeguard(
        "unique-key",
        "Orders may have the same key: nothing knows a key whose stored answer is past its day.",
        (UNIQUE_KEY,),
        red=(f"{OF_ORDER_KEYS}::test_a_key_finds_its_order_after_the_stored_answer_is_gone[local]",),
        green=f"{OF_ORDER_KEYS}::test_a_second_place_with_the_same_key_hears_the_first_answer[local]",
    ),
    Safeguard(
        "twins",
        "The claim and the unique key at once: of two twins that meet, either alone still makes one order.",
        (CLAIM, UNIQUE_KEY),
        red=(f"{OF_ORDER_KEYS}::test_a_twin_waits_for_the_first_and_hears_its_answer[local]",),
        green=f"{OF_ORDER_KEYS}::test_a_second_place_with_the_same_key_hears_the_first_answer[local]",
    ),
    Safeguard(
        "fingerprint",
        "A key is answered whatever the request is.",
        (
            Edit(
                KEYS,
                "row.answer if row.fingerprint == keyed.fingerprint else IdempotencyKeyReused()",
                "row.answer",
            ),
        ),
        red=(
            f"{OF_ORDER_KEYS}::test_the_same_key_with_another_request_is_refused[local]",
            f"{OF_KEYS_AT_THE_EDGE}::test_the_key_with_another_body_is_refused_and_nothing_runs",
        ),
        green=f"{OF_ORDER_KEYS}::test_a_second_place_with_the_same_key_hears_the_first_answer[local]",
    ),
    Safeguard(
        "fingerprint-of-orders",
        "The same where the order itself answers: in one batch, and after the day of the stored answer.",
        (Edit(PLACING, "        mine = self.keyed.fingerprint == fingerprint\n", "        mine = True\n"),),
        red=(
            f"{OF_ORDER_KEYS}::test_a_twin_with_another_request_in_one_batch_is_refused[local]",
            f"{OF_ORDER_KEYS}::"
            "test_another_request_is_refused_after_the_stored_answer_is_gone_and_the_right_one_is_not[local]",
        ),
        green=f"{OF_ORDER_KEYS}::test_a_key_finds_its_order_after_the_stored_answer_is_gone[local]",
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
        ),
        green=f"{OF_CHARGING}::test_an_attempt_is_authorized_once[local]",
    ),
    Safeguard(
        "provider-key",
        "The provider is asked with a new key each time. (`key_of` alone is no lock: the stored key is what is sent.)",
        (
            Edit(CHARGING, "import asyncio\n", "import asyncio\nimport secrets\n"),
            Edit(CHARGING, "key=self.operation.key,", 'key=f"{self.operation.key}:{secrets.token_hex(8)}",'),
        ),
        red=(f"{OF_RECOVERY}::test_a_process_that_hangs_with_the_answer_in_its_hand_is_passed[local]",),
        green=f"{OF_CHARGING}::test_an_authorized_payment_holds_the_amount_and_takes_nothing[local]",
    ),
    Safeguard(
        "bank-says-yes",
        "The reconciliation does not record what the bank has done.",
        (Edit(RECONCILING, "        if outcomes:\n", "        if False:\n"),),
        red=(f"{OF_RECONCILING}::test_what_the_bank_has_done_is_recorded[local]",),
        green=f"{OF_RECONCILING}::test_books_that_agree_have_no_mismatch[local]",
    ),
    Safeguard(
        "give-back",
        "The reconciliation does not give back an authorization that nobody wants.",
        (Edit(RECONCILING, "        if charges:\n", "        if False:\n"),),
        red=(f"{OF_RECONCILING}::test_an_authorization_that_nobody_wants_is_given_back[local-voided]",),
        green=f"{OF_RECONCILING}::test_books_that_agree_have_no_mismatch[local]",
    ),
    # ---------------------------------------------------------------------------------------------------------- stock
    Safeguard(
        "stock-decision",
        "Nobody looks whether there is enough before writing: nothing is oversold, but buyers hear of a failure.",
        (
            Edit(
                STOCK_RULES,
                "            if (available := self._available(line.product_id)) < line.quantity\n",
                "            if (available := self._available(line.product_id)) < 0\n",
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
        "stock-check",
        "The table lets more be reserved than there is.",
        (CHECK_OF_LEVELS,),
        red=(f"{OF_CONTENTION}::test_the_check_of_levels_is_a_lock_of_its_own[local]",),
        green=f"{OF_RESERVING}::test_all_lines_or_none[local]",
    ),
    Safeguard(
        "stock-lock",
        "Levels are not locked while it is decided: the guard stops the second buyer, who hears of a failure.",
        (LOCK_OF_LEVELS,),
        red=(LAST_PIECE,),
        green=f"{OF_RESERVING}::test_all_lines_or_none[local]",
    ),
    Safeguard(
        "last-piece",
        "Lock, guard and CHECK at once: with one of them left, the last piece is never promised twice.",
        (LOCK_OF_LEVELS, GUARD_OF_LEVELS, CHECK_OF_LEVELS),
        red=(LAST_PIECE,),
        green=f"{OF_RESERVING}::test_all_lines_or_none[local]",
    ),
    # ---------------------------------------------------------------------------------------------------------- locks
    Safeguard(
        "order-of-keys",
        "Idempotency keys are claimed in the order in which they are named.",
        (Edit(KEYS, "         ORDER BY w.principal, w.key\n", ""),),
        red=(f"{OF_KEYS}::test_batches_with_the_same_keys_in_other_orders_do_not_deadlock",),
        green=f"{OF_KEYS}::test_a_twin_waits_and_hears_the_answer_of_the_first",
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
        (
            Edit(
                SAGA,
                "             ORDER BY s.subject_id, s.kind, s.reference\n"
                "               FOR NO KEY UPDATE OF s\n        )",
                "             ORDER BY array_position($1::bigint[], s.subject_id)\n"
                "               FOR NO KEY UPDATE OF s\n        )",
            ),
        ),
        red=(f"{OF_SAGA}::test_batches_that_meet_in_the_middle_do_not_wait_for_each_other",),
        green=f"{OF_SAGA}::test_those_of_a_batch_that_were_not_taken_over_are_saved",
    ),
    # ---------------------------------------------------------------------------------------------------------- sagas
    Safeguard(
        "epoch",
        "A saga is saved by a driver from whom it was taken over. (In both places: each covers the other.)",
        (
            Edit(
                SAGA,
                "             WHERE s.epoch = w.epoch AND s.version = w.version\n             ORDER BY",
                "             WHERE s.version = w.version\n             ORDER BY",
            ),
            Edit(
                SAGA,
                "               AND s.epoch = w.epoch AND s.version = w.version\n            RETURNING",
                "               AND s.version = w.version\n            RETURNING",
            ),
        ),
        red=(f"{OF_SAGA}::test_a_driver_of_another_epoch_is_refused_though_the_version_is_right",),
        green=f"{OF_SAGA}::test_a_save_whose_commit_was_not_heard_of_is_not_made_again",
    ),
    Safeguard(
        "version",
        "A saga is saved once more by a driver who never heard that it was. (In both places, as above.)",
        (
            Edit(
                SAGA,
                "             WHERE s.epoch = w.epoch AND s.version = w.version\n             ORDER BY",
                "             WHERE s.epoch = w.epoch\n             ORDER BY",
            ),
            Edit(
                SAGA,
                "               AND s.epoch = w.epoch AND s.version = w.version\n            RETURNING",
                "               AND s.epoch = w.epoch\n            RETURNING",
            ),
        ),
        red=(f"{OF_SAGA}::test_a_save_whose_commit_was_not_heard_of_is_not_made_again",),
        green=f"{OF_SAGA}::test_a_driver_of_another_epoch_is_refused_though_the_version_is_right",
    ),
)
