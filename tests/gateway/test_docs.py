"""The documentation's pages: complete, self-contained, and allowed to do no more than they must."""

import io
import json
import re
import shlex
import shutil
import subprocess
import urllib.request
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from mercato.contracts.order_moves import AXES
from mercato.contracts.order_refusals import Axis
from mercato.gateway import diagram, docs, openapi
from mercato.gateway.routes import ROUTES
from mercato.testing.waiting import BOUND_SECONDS

PAGES = docs.pages(ROUTES)
HTML_PATHS = ["/account/email", "/account/password", "/docs", "/docs/problems"]
MAX_TOTAL_BYTES = 104 * 1024

each_html = pytest.mark.parametrize("path", HTML_PATHS)


class Elements(HTMLParser):
    """The elements of a page, with their attributes, and the ids in the order in which they come."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    @property
    def addresses(self) -> list[str]:
        return [value for _, a in self.seen for name in ("href", "src") if (value := a.get(name)) is not None]

    @property
    def ids(self) -> list[str]:
        return [value for _, a in self.seen if (value := a.get("id")) is not None]


def text(path: str) -> str:
    return PAGES[path].body.decode()


def codes_in_the_description() -> set[str]:
    documents = [openapi.document(ROUTES, open_shop=open_shop, server_url=None) for open_shop in (False, True)]
    return {code for document in documents for code in document["components"]["examples"]}


# ----------------------------------------------------------------------------------------------------------- all pages


def test_these_are_the_pages():
    assert {path: page.content_type.partition(";")[0] for path, page in PAGES.items()} == {
        "/account/email": "text/html",
        "/account/password": "text/html",
        "/docs": "text/html",
        "/docs/account.js": "text/javascript",
        "/docs/docs.js": "text/javascript",
        "/docs/samples.js": "text/javascript",
        "/docs/docs.css": "text/css",
        "/docs/problems": "text/html",
    }


@pytest.mark.parametrize("path", PAGES)
def test_no_page_speaks_of_another_host(path: str):
    assert re.findall(r"https?://[^/'\"`\s]+", text(path)) == []


@pytest.mark.parametrize("path", PAGES)
def test_browsers_may_load_and_call_this_shop_alone(path: str):
    policy = dict(part.strip().split(" ", 1) for part in PAGES[path].headers["content-security-policy"].split(";"))

    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src")} == {"'self'"}


def test_what_is_sent_stays_small():
    assert sum(len(page.body) for page in PAGES.values()) < MAX_TOTAL_BYTES


@each_html
def test_a_page_works_under_its_policy(path: str):
    page = Elements(text(path))

    assert [tag for tag, a in page.seen if tag == "style" or (tag == "script" and "src" not in a)] == []
    assert [name for _, a in page.seen for name in a if name == "style" or name.startswith("on")] == []


@each_html
def test_a_page_refers_to_what_is_there(path: str):
    page = Elements(text(path))
    local = {address.partition("?")[0].partition("#")[0] for address in page.addresses if address.startswith("/")}
    anchors = {address.removeprefix("#") for address in page.addresses if address.startswith("#")}
    others = {address for address in page.addresses if not address.startswith(("/", "#"))}

    assert local <= {*PAGES, *openapi.PAGES}
    assert anchors <= set(page.ids)
    assert others == {"data:,"}


@each_html
def test_ids_are_unique(path: str):
    ids = Elements(text(path)).ids

    assert len(ids) == len(set(ids))


def test_an_asset_that_is_kept_for_ever_has_its_content_in_its_address():
    addresses = [address for address in Elements(text("/docs")).addresses if address.startswith("/docs/docs.")]

    assert {address.partition("?")[0] for address in addresses} == {"/docs/docs.js", "/docs/docs.css"}
    assert all(re.search(r"\?v=[0-9a-f]{12}$", address) for address in addresses)
    assert "immutable" in PAGES["/docs/docs.js"].headers["cache-control"]
    assert "immutable" not in PAGES["/docs"].headers["cache-control"]


# ---------------------------------------------------------------------------------------------------------- states


def test_the_diagram_of_an_orders_states_has_its_legal_moves_and_no_others():
    arrows = [attributes for _, attributes in Elements(text("/docs")).seen if "data-from" in attributes]
    shown = {
        axis: sorted((a["data-from"], a["data-to"]) for a in arrows if a["marker-end"] == f"url(#arrow-{axis})")
        for axis in AXES
    }

    assert shown == {
        axis: sorted((before, after) for before in moves for after in moves[before]) for axis, moves in AXES.items()
    }
    assert len(arrows) == sum(len(moves) for moves in shown.values())


@pytest.mark.parametrize("axis", AXES)
def test_the_boxes_of_a_diagram_do_not_cover_each_other(axis: Axis):
    boxes = [a for tag, a in Elements(diagram.svg(axis, AXES[axis])).seen if tag == "rect"]
    corners = {(box["x"], box["y"]) for box in boxes}

    assert len(corners) == len(boxes) == len(AXES[axis])


# ---------------------------------------------------------------------------------------------------------- script


def test_the_script_keeps_no_token_and_makes_no_markup_of_data():
    script = text("/docs/docs.js") + text("/docs/samples.js")

    assert [word for word in ("localStorage", "sessionStorage", "indexedDB", "document.cookie") if word in script] == []
    assert [word for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(") if word in script] == []


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("path", ["/docs/docs.js", "/docs/samples.js"])
def test_a_script_has_no_syntax_error(path: str):
    script = PAGES[path].body
    done = subprocess.run(["node", "--check", "-"], input=script, capture_output=True, timeout=BOUND_SECONDS)

    assert done.returncode == 0, done.stderr.decode()


def test_the_elements_that_the_script_looks_for_are_in_the_page():
    wanted = set(re.findall(r'byId\("([\w-]+)"\)', text("/docs/docs.js")))

    assert wanted <= set(Elements(text("/docs")).ids)


# --------------------------------------------------------------------------------------------------------- samples

URL = "http://shop.example"
TOKENS = [None, "", "a.token"]


def requests() -> list[dict[str, Any]]:
    """One for each example of each operation of the description, with each kind of token."""
    document = openapi.document(ROUTES, open_shop=False, server_url=None)
    found: list[dict[str, Any]] = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            headers: dict[str, str] = {}
            target = path
            for parameter in operation.get("parameters", ()):
                named = document["components"]["parameters"].get(
                    parameter.get("$ref", "").rpartition("/")[2], parameter
                )
                if named["in"] == "header":
                    headers[named["name"]] = named["example"]
                elif named["in"] == "path":
                    target = path.replace(f"{{{named['name']}}}", str(named["example"]))
            content = operation.get("requestBody", {}).get("content", {"": {}})
            examples: list[Any] = [e["value"] for e in next(iter(content.values())).get("examples", {}).values()]
            for i, body in enumerate(examples or [None]):
                one = {"method": method.upper(), "url": URL + target, "token": TOKENS[i % 3], "headers": headers}
                if body is not None:
                    json_headers = {**headers, "Content-Type": "application/json"}
                    one |= {"headers": json_headers, "body": json.dumps(body, indent=2)}
                found.append(one)
    return found


RUN = """
const given = JSON.parse(require("fs").readFileSync(0, "utf8"));
eval(given.script);
const made = given.requests.map((request) => {
  return Object.fromEntries(Object.entries(samples).map(([name, make]) => [name, make(request)]));
});
const run = async () => {
  for (const one of made) {
    globalThis.fetch = async (url, options) => {
      one.called = { url, ...options };
      return { status: 200, text: async () => "" };
    };
    console.log = () => {};
    await eval(`(async () => { ${one.JavaScript} })()`);
  }
  process.stdout.write(JSON.stringify(made));
};
run();
"""


@pytest.fixture(scope="module")
def made() -> list[dict[str, Any]]:
    """The samples of each request, and in `called` what the one in JavaScript calls `fetch` with."""
    given = json.dumps({"script": text("/docs/samples.js"), "requests": requests()})
    done = subprocess.run(["node", "-e", RUN], input=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def expected(request: dict[str, Any], stand_in: str) -> tuple[str, str, dict[str, str], Any]:
    """Method, address, headers and body; of the token that is not shown, what stands in for it."""
    headers = {name.lower(): value for name, value in request["headers"].items()}
    if request["token"] is not None:
        headers["authorization"] = f"Bearer {request['token'] or stand_in}"
    return request["method"], request["url"], headers, json.loads(request["body"]) if "body" in request else None


needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


@needs_node
def test_every_sample_in_javascript_sends_its_request(made: list[dict[str, Any]]):
    for request, one in zip(requests(), made, strict=True):
        called = one["called"]
        headers = {name.lower(): value for name, value in called["headers"].items()}
        body = json.loads(called["body"]) if "body" in called else None

        assert (called["method"], called["url"], headers, body) == expected(request, "ACCESS_TOKEN")


@needs_node
def test_every_sample_in_python_sends_its_request(made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    sent: list[urllib.request.Request] = []

    class Answer(io.BytesIO):
        status = 200

    def urlopen(request: urllib.request.Request, timeout: float) -> Answer:
        assert timeout > 0
        sent.append(request)
        return Answer()

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for request, one in zip(requests(), made, strict=True):
        exec(compile(one["Python"], "sample", "exec"), {})
        last = sent[-1]
        headers = {name.lower(): value for name, value in last.header_items()}
        body = json.loads(last.data) if isinstance(last.data, bytes) else None

        assert (last.get_method(), last.full_url, headers, body) == expected(request, "ACCESS_TOKEN")


@needs_node
def test_every_sample_of_a_shell_sends_its_request(made: list[dict[str, Any]]):
    for request, one in zip(requests(), made, strict=True):
        words = shlex.split(one["curl"].replace("\\\n", ""))
        options = list(pairwise(words))
        headers = dict(value.split(": ", 1) for name, value in options if name == "-H")
        bodies = [json.loads(value) for name, value in options if name == "-d"]
        methods = [value for name, value in options if name == "-X"] or ["GET"]
        sent = methods[0], next(word for word in words if word.startswith(URL))

        assert (*sent, {n.lower(): v for n, v in headers.items()}, bodies[0] if bodies else None) == expected(
            request, "$TOKEN"
        )


# -------------------------------------------------------------------------------------------------------- problems


def test_every_problem_of_the_description_has_its_place():
    assert codes_in_the_description() <= set(Elements(text("/docs/problems")).ids)


def test_every_problem_has_a_status_and_a_remedy():
    refusals = docs.refusals(ROUTES)

    assert {refusal.code for refusal in refusals} == set(docs.REMEDIES)
    assert all(400 <= refusal.status < 600 and refusal.sentence for refusal in refusals)
    assert len({refusal.code for refusal in refusals}) == len(refusals)


def test_links_of_problems_lead_to_operations():
    links = re.findall(r'href="/docs#([^"]+)"', text("/docs/problems"))

    assert links
    assert set(links) <= {openapi.operation_id(route) for route in ROUTES}
