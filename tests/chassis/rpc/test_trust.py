"""What is forged, altered, expired, for another service or not granted is refused and counted."""

from __future__ import annotations

import base64
import datetime
import json

import pytest

from mercato.chassis.contract import (
    ANONYMOUS_ACTOR,
    SERVICE_ROLE,
    Actor,
    Context,
    Contract,
    Empty,
    Forbidden,
    Retry,
    Unauthenticated,
    batched,
)
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.rpc import trust
from mercato.chassis.rpc.signatures import public_key
from mercato.chassis.rpc.trust import LIFE_SECONDS, REASONS, SKEW_SECONDS, Grant, TokenSigner, Trust

SEEDS = {name: bytes([number]) * 32 for number, name in enumerate(("gateway", "orders", "products"), 1)}
CUSTOMER = Actor("customer", 7)


class Stock(Contract, name="stock"):
    look = batched(Empty, Empty, allow=frozenset(), retry=Retry.SAFE)
    take = batched(Empty, Empty, allow=frozenset())


GRANTS = {
    "gateway": Grant(frozenset({"stock.look"}), frozenset({"anonymous", "customer", "staff"})),
    "orders": Grant(frozenset({"stock.look", "stock.take"})),
}


class MovedClock:
    def __init__(self) -> None:
        self.seconds = 1_800_000_000.5

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.seconds, datetime.UTC)


class TrustHarness:
    def __init__(self) -> None:
        self.clock = MovedClock()
        self.telemetry = Telemetry()
        self.keys = {name: public_key(seed) for name, seed in SEEDS.items()}
        self.trust = Trust(["stock"], self.keys, GRANTS, self.clock, self.telemetry)

    def signer(self, service: str = "orders", seed: bytes | None = None) -> TokenSigner:
        return TokenSigner(service, seed or SEEDS[service], self.clock)

    def refused(self, token: str | None, service: str = "stock") -> str:
        """Why a token is refused: the reason that was counted."""
        before = self.counts()
        with pytest.raises(Unauthenticated) as raised:
            self.trust.caller(token, service)
        [reason] = [name for name, count in self.counts().items() if count != before.get(name)]
        assert f"({reason})" in raised.value.reason
        return reason

    def counts(self) -> dict[str, float]:
        """How many were refused, by reason."""
        return {reason: count for reason, count in self.shown().items() if count}

    def shown(self) -> dict[str, float]:
        return {
            sample.labels["reason"]: sample.value
            for metric in self.telemetry.registry.collect()
            for sample in metric.samples
            if sample.name == "mercato_rpc_untrusted_total"
        }


@pytest.fixture
def harness() -> TrustHarness:
    return TrustHarness()


def context(actor: Actor) -> Context:
    return Context(actor, 1e12, "t", "r")


def with_claims(token: str, **claims: object) -> str:
    """The token with other claims, and its old signature."""
    header, payload, signature = token.split(".")
    changed = json.loads(base64.urlsafe_b64decode(payload + "==")) | claims
    return ".".join([header, base64.urlsafe_b64encode(json.dumps(changed).encode()).decode().rstrip("="), signature])


# ------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("service", SEEDS)
def test_a_caller_is_known_by_the_token_that_it_signed(harness: TrustHarness, service: str):
    token = harness.signer(service).token("stock")

    assert harness.trust.caller(token, "stock") == service
    assert harness.trust.caller(token, "stock") == service, "remembered"
    assert harness.counts() == {}


@pytest.mark.parametrize("token", [None, ""])
def test_a_call_without_a_token_is_refused(harness: TrustHarness, token: str | None):
    assert harness.refused(token) == "missing"


@pytest.mark.parametrize("token", ["x", "a.b.c", "..", "é", "eyJhbGciOiJub25lIn0.e30."])
def test_what_is_no_token_is_refused(harness: TrustHarness, token: str):
    assert harness.refused(token) in ("malformed", "signature")


def test_a_token_that_was_signed_by_another_key_is_refused(harness: TrustHarness):
    assert harness.refused(harness.signer("orders", seed=b"x" * 32).token("stock")) == "signature"


def test_a_service_that_is_not_known_is_refused(harness: TrustHarness):
    assert harness.refused(harness.signer("strange", seed=SEEDS["orders"]).token("stock")) == "signature"


def test_a_service_cannot_sign_in_the_name_of_another(harness: TrustHarness):
    products = harness.signer("products")
    header = {"alg": "EdDSA", "typ": trust.TOKEN_TYPE, "kid": "products"}
    now = harness.clock.seconds
    claims = {"iss": "orders", "aud": "stock", "iat": now, "exp": now + 60}
    forged = trust.jwt.encode(header, claims, products._key, registry=trust.ALGORITHMS)

    assert harness.refused(forged) == "signature"


@pytest.mark.parametrize("claims", [{"iss": "gateway"}, {"aud": "users"}, {"exp": 9e9}, {"iat": 0}])
def test_an_altered_token_is_refused(harness: TrustHarness, claims: dict[str, object]):
    assert harness.refused(with_claims(harness.signer().token("stock"), **claims)) == "signature"


def test_a_token_of_another_type_is_refused(harness: TrustHarness, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trust, "TOKEN_TYPE", "at+jwt")
    token = harness.signer().token("stock")
    monkeypatch.undo()

    assert harness.refused(token) == "signature"


def test_an_expired_token_is_refused_also_when_it_was_remembered(harness: TrustHarness):
    token = harness.signer().token("stock")
    harness.clock.seconds += LIFE_SECONDS - 1
    assert harness.trust.caller(token, "stock") == "orders"
    harness.clock.seconds += 1

    assert harness.refused(token) == "expired"


def test_a_token_for_another_service_is_refused(harness: TrustHarness):
    assert harness.refused(harness.signer().token("users")) == "audience"
    assert harness.refused(harness.signer().token("users"), "users") == "audience", "not served here"


def test_a_token_from_the_future_or_for_ever_is_refused(harness: TrustHarness, monkeypatch: pytest.MonkeyPatch):
    harness.clock.seconds += SKEW_SECONDS + 2
    early = harness.signer().token("stock")
    harness.clock.seconds -= SKEW_SECONDS + 2
    assert harness.refused(early) == "times"

    monkeypatch.setattr(trust, "LIFE_SECONDS", 86_400.0)
    long = harness.signer().token("stock")
    monkeypatch.undo()
    assert harness.refused(long) == "times"


def test_a_token_serves_for_half_of_its_life(harness: TrustHarness):
    signer = harness.signer()
    first = signer.token("stock")
    harness.clock.seconds += LIFE_SECONDS / 2 - 1
    assert signer.token("stock") == first
    assert signer.token("users") != first
    harness.clock.seconds += 1

    assert signer.token("stock") != first


def test_a_flood_of_tokens_is_not_remembered_for_ever(harness: TrustHarness, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trust, "REMEMBERED_TOKENS", 3)
    for _ in range(10):
        harness.clock.seconds += LIFE_SECONDS
        assert harness.trust.caller(harness.signer().token("stock"), "stock") == "orders"

    assert len(harness.trust._verified) <= 3


def test_each_reason_is_counted_from_0_on_so_that_the_first_refusal_is_an_increase(harness: TrustHarness):
    assert harness.shown() == dict.fromkeys(REASONS, 0.0)


# ------------------------------------------------------------------------------------------------------------- grants


def test_what_a_service_is_known_to_call_is_not_refused(harness: TrustHarness):
    contexts = [context(Actor(SERVICE_ROLE)), context(CUSTOMER), context(ANONYMOUS_ACTOR)]

    assert harness.trust.refusals("orders", Stock.take, contexts) == {}
    assert harness.trust.refusals("gateway", Stock.look, contexts[1:]) == {}
    assert harness.counts() == {}


@pytest.mark.parametrize("caller", ["gateway", "products"])
def test_an_operation_that_a_service_does_not_call_is_refused(harness: TrustHarness, caller: str):
    refusals = harness.trust.refusals(caller, Stock.take, [context(CUSTOMER)] * 2)

    assert [type(refusal) for refusal in refusals.values()] == [Forbidden, Forbidden]
    assert [*refusals] == [0, 1]
    assert harness.counts() == {"operation": 1.0}


def test_the_gateway_does_not_speak_for_the_shop(harness: TrustHarness):
    contexts = [context(CUSTOMER), context(Actor(SERVICE_ROLE)), context(Actor("root"))]

    refusals = harness.trust.refusals("gateway", Stock.look, contexts)

    assert [*refusals] == [1, 2]
    assert harness.counts() == {"role": 1.0}
