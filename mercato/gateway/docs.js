// Reads /openapi.json and shows it: what can be called, by whom, with what, what it answers; and calls it.
"use strict";

(() => {
  const METHODS = new Set(["get", "post", "put", "patch", "delete"]);
  const JSON_TYPE = "application/json";
  const byId = (id) => document.getElementById(id);
  const words = (text) => text.toLowerCase().split(/\s+/).filter(Boolean);
  const views = new Map();
  let api = {};

  // ------------------------------------------------------------------------------------------------------ elements

  /** An element. Attributes that start with "on" are listeners, true is an attribute without a value. */
  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value != null) element.setAttribute(name, value);
    }
    element.append(...children.flat().filter((child) => child != null && child !== ""));
    return element;
  }

  const code = (text, kind) => make("code", { class: kind }, text);
  const heading = (text) => make("h4", null, text);

  /** Text with `code`, **weight** and [links](/path). */
  function inline(text) {
    return (text || "").split(/(`[^`]+`|\*\*[^*]+\*\*|\[[^\]]+\]\([^)]+\))/).map((part) => {
      if (part.startsWith("`")) return code(part.slice(1, -1));
      if (part.startsWith("**")) return make("strong", null, part.slice(2, -2));
      const link = part.match(/^\[(.+)\]\((\/.*)\)$/);
      return link ? make("a", { href: link[2] }, link[1]) : part;
    });
  }

  const prose = (text) => (text || "").split(/\n\n+/).filter(Boolean).map((part) => make("p", null, inline(part)));

  const TOKEN = /("(?:[^"\\]|\\.)*")(\s*:)?|\b(true|false|null)\b|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g;

  /** JSON with its keys, strings and literals told apart. */
  function painted(text) {
    const parts = [];
    let end = 0;
    for (const match of text.matchAll(TOKEN)) {
      const kind = match[2] ? "key" : match[1] ? "string" : "literal";
      parts.push(text.slice(end, match.index), make("span", { class: kind }, match[1] || match[0]), match[2]);
      end = match.index + match[0].length;
    }
    return [...parts, text.slice(end)];
  }

  const pretty = (value) => JSON.stringify(value, null, 2);
  const block = (...content) => make("pre", { tabindex: "0" }, ...content);
  const jsonBlock = (value) => block(painted(pretty(value)));

  // ------------------------------------------------------------------------------------------------------- schemas

  /** What a reference refers to; everything else as it is. */
  function resolved(thing) {
    if (!thing || !thing.$ref) return thing || {};
    return resolved(thing.$ref.slice(2).split("/").reduce((at, key) => at[key.replace(/~1/g, "/")], api));
  }

  const nameOf = (reference) => reference.split("/").pop();

  function typeOf(schema) {
    if (schema.$ref) return nameOf(schema.$ref);
    if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
    if ("const" in schema) return JSON.stringify(schema.const);
    const kinds = [].concat(schema.type || "anything");
    return kinds.map((kind) => (kind === "array" ? `array of ${typeOf(schema.items || {})}` : kind)).join(" or ");
  }

  const RANGES = [["minLength", "maxLength", " characters"], ["minItems", "maxItems", " items"], ["minimum", "maximum", ""]];

  function range(least, most, unit) {
    if (most === undefined) return `at least ${least}${unit}`;
    return least === undefined ? `at most ${most}${unit}` : `${least} to ${most}${unit}`;
  }

  /** The constraints of a schema, each a short phrase. */
  function limitsOf(schema) {
    const limits = [];
    if (schema.format) limits.push(schema.format);
    if (schema.enum) limits.push(schema.enum.map((value) => JSON.stringify(value)).join(", "));
    const known = schema["x-extensible-enum"];
    if (known) limits.push(`${known.map((value) => JSON.stringify(value)).join(", ")}, or a later one`);
    for (const [least, most, unit] of RANGES) {
      if (least in schema || most in schema) limits.push(range(schema[least], schema[most], unit));
    }
    if (schema.pattern) limits.push(`matches ${schema.pattern}`);
    if ("default" in schema && schema.default !== "") limits.push(`default ${JSON.stringify(schema.default)}`);
    return limits;
  }

  /** The schema inside: of an array its items, of "X or null" the X. */
  function inner(schema) {
    const option = schema.anyOf ? schema.anyOf.find((each) => each.type !== "null") : schema.items;
    return option ? inner(option) : schema;
  }

  /** The fields of an object, with those of the objects in it; `seen` has the names that it is inside of. */
  function fields(schema, seen = []) {
    const whole = resolved(schema);
    const required = new Set(whole.required || []);
    const rows = Object.entries(whole.properties || {}).map(([name, part]) => {
      const below = inner(part);
      const deeper = below.$ref && !seen.includes(below.$ref) && resolved(below).properties;
      return make("li", null,
        make("div", { class: "line" }, code(name, "name"), make("span", { class: "type" }, typeOf(part)),
          required.has(name) ? make("span", { class: "must" }, "required") : ""),
        limitsOf(part).length ? make("div", { class: "limits" }, limitsOf(part).join(" · ")) : "",
        part.description ? make("div", null, inline(part.description)) : "",
        deeper ? fields(below, [...seen, below.$ref]) : "");
    });
    return rows.length ? make("ul", { class: "fields" }, rows) : make("p", { class: "quiet" }, "An object without fields.");
  }

  function schemaView(schema) {
    const below = inner(schema);
    return make("details", { class: "schema" },
      make("summary", null, `Schema: ${typeOf(schema)}`),
      prose(resolved(below).description), fields(below, [below.$ref]));
  }

  // ------------------------------------------------------------------------------------------------------- request

  const freshKey = () =>
    Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

  function startValue(parameter) {
    if (parameter.name === "Idempotency-Key") return freshKey();
    return parameter.required && parameter.example !== undefined ? String(parameter.example) : "";
  }

  function control(id, parameter) {
    const choices = parameter.schema.enum;
    if (choices) {
      return make("select", { id }, make("option", { value: "" }, "any"),
        choices.map((choice) => make("option", { value: choice }, String(choice))));
    }
    const numeric = [].concat(parameter.schema.type).includes("integer");
    const hint = "default" in parameter.schema ? String(parameter.schema.default) : "";
    return make("input", { id, type: "text", value: startValue(parameter), placeholder: hint, autocomplete: "off",
      spellcheck: "false", inputmode: numeric ? "numeric" : null });
  }

  /** The inputs of an operation, and the request that they make. */
  class Form {
    constructor(operation) {
      this.operation = operation;
      this.inputs = (operation.parameters || []).map(resolved).map((parameter) =>
        ({ parameter, input: control(`${operation.operationId}-${parameter.name}`, parameter) }));
      const media = resolved(operation.requestBody).content;
      this.media = media && media[JSON_TYPE];
      if (this.media) this.makeBody();
    }

    makeBody() {
      const examples = Object.entries(this.media.examples);
      this.body = make("textarea", { id: `${this.operation.operationId}-body`, spellcheck: "false", rows: "8" });
      this.choice = make("select", { "aria-label": "Example", onchange: () => this.show(this.choice.value) },
        examples.map(([name]) => make("option", { value: name }, name)));
      this.show(examples[0][0]);
    }

    show(name) {
      this.body.value = pretty(this.media.examples[name].value);
      this.body.rows = Math.min(16, this.body.value.split("\n").length + 1);
    }

    view() {
      const rows = this.inputs.map(({ parameter, input }) => make("div", { class: "parameter" },
        make("label", { for: input.id, class: "line" }, code(parameter.name, "name"),
          make("span", { class: "type" }, `${parameter.in}, ${typeOf(parameter.schema)}`),
          parameter.required ? make("span", { class: "must" }, "required") : ""),
        input,
        make("div", { class: "limits" }, limitsOf({ ...parameter.schema, enum: undefined }).join(" · ")),
        parameter.description ? make("div", null, inline(parameter.description)) : ""));
      const parts = rows.length ? [heading("Parameters"), ...rows] : [];
      if (this.media) {
        parts.push(heading("Body"), make("div", { class: "row" }, this.choice),
          make("label", { for: this.body.id, class: "unseen" }, "Body, JSON"), this.body, schemaView(this.media.schema));
      }
      return parts.length ? parts : [make("p", { class: "quiet" }, "Takes nothing.")];
    }

    /** Path with query, headers and body as they stand in the inputs. */
    request(path) {
      const query = new URLSearchParams();
      const headers = {};
      for (const { parameter, input } of this.inputs) {
        const value = input.value.trim();
        if (parameter.in === "path") path = path.replace(`{${parameter.name}}`, encodeURIComponent(value || "?"));
        else if (value && parameter.in === "query") query.append(parameter.name, value);
        else if (value) headers[parameter.name] = value;
      }
      const body = this.body && this.body.value.trim() ? this.body.value : undefined;
      if (body !== undefined) headers["Content-Type"] = JSON_TYPE;
      return { target: String(query) ? `${path}?${query}` : path, headers, body };
    }
  }

  const language = make("select", { class: "language", "aria-label": "Language of the samples" },
    Object.keys(samples).map((name) => make("option", { value: name }, name)));
  let chosen = language.value;

  /** The request in the chosen language. The token stands in it only where that is wanted: samples are pasted elsewhere. */
  function sample(method, { target, headers, body }, needsToken) {
    const token = byId("token").value.trim();
    const shown = token && byId("shown").checked ? token : needsToken || token ? "" : null;
    return samples[chosen]({ method, url: location.origin + target, headers, body, token: shown });
  }

  async function copy(button, text) {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Select it";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  async function send(method, { target, headers, body }) {
    const token = byId("token").value.trim();
    const all = token ? { ...headers, Authorization: `Bearer ${token}` } : headers;
    const started = performance.now();
    const answer = await fetch(target, { method, headers: all, body, cache: "no-store", credentials: "omit" });
    const text = await answer.text();
    return { answer, text, milliseconds: performance.now() - started };
  }

  // -------------------------------------------------------------------------------------------------------- answers

  function answerView({ answer, text, milliseconds }) {
    const headers = [...answer.headers].map(([name, value]) => `${name}: ${value}`).join("\n");
    const type = answer.headers.get("content-type") || "";
    let json;
    try {
      json = /json/.test(type) ? JSON.parse(text) : undefined;
    } catch { /* shown as it came */ }
    return [
      make("p", { class: `verdict ${answer.ok ? "good" : "bad"}` }, make("strong", null, String(answer.status)),
        ` ${answer.statusText} in ${Math.round(milliseconds)} ms`),
      json && json.access_token ? useToken(json.access_token) : "",
      make("details", { class: "schema" }, make("summary", null, "Headers"), block(headers)),
      text ? (json === undefined ? block(text) : jsonBlock(json)) : "",
    ];
  }

  const useToken = (token) => make("button", { type: "button", onclick: (event) => {
    setToken(token);
    event.target.textContent = "In use until this page is closed";
  } }, "Use this access token");

  // -------------------------------------------------------------------------------------------------------- sign-in

  function setToken(token) {
    byId("token").value = token;
    byId("token").dispatchEvent(new Event("input"));
  }

  function toggle(button, view) {
    const opens = button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(opens));
    view(opens);
  }

  async function signIn(event) {
    event.preventDefault();
    const form = event.target;
    const said = byId("signed");
    const body = JSON.stringify(Object.fromEntries(new FormData(form)));
    try {
      const { answer, text } = await send("POST", { target: "/login", headers: { "Content-Type": JSON_TYPE }, body });
      const json = JSON.parse(text);
      if (answer.ok) {
        setToken(json.access_token);
        form.reset();
      }
      said.textContent = answer.ok
        ? `Signed in as ${json.user.email} (${json.user.role}). The token is kept in the memory of this page alone.` : json.detail;
    } catch (error) {
      said.textContent = `No answer: ${error.message}`;
    }
  }

  byId("credentials").addEventListener("submit", signIn);
  byId("account").addEventListener("click", () => toggle(byId("account"), (opens) => {
    byId("sign-in").hidden = !opens;
    if (opens) byId("credentials").elements.email.focus();
  }));
  byId("token").addEventListener("input", () => {
    byId("account").textContent = byId("token").value ? "Signed in" : "Sign in";
    document.dispatchEvent(new Event("sample"));
  });
  byId("shown").addEventListener("change", () => document.dispatchEvent(new Event("sample")));

  // On a narrow screen the list of operations is a menu, which closes when one is chosen.
  const showMenu = () => toggle(byId("menu"), (opens) => byId("nav").classList.toggle("open", opens));
  byId("menu").addEventListener("click", showMenu);
  byId("nav").addEventListener("click", (event) => {
    if (event.target.closest("a") && byId("nav").classList.contains("open")) showMenu();
  });

  function responseView(status, reference) {
    const response = resolved(reference);
    const [type, media] = Object.entries(response.content || {})[0] || [];
    const headers = Object.keys(response.headers || {});
    const row = [make("div", { class: "line" }, make("span", { class: `status s${status[0]}` }, status),
      make("span", null, response.description))];
    if (headers.length) row.push(make("div", { class: "limits" }, `Headers: ${headers.join(", ")}`));
    if (type === "application/problem+json") {
      row.push(make("ul", { class: "codes" }, Object.entries(media.examples).map(([name, example]) => make("li", null,
        make("a", { href: `/docs/problems#${name}` }, code(name)), " ", resolved(example).summary))));
    } else if (media) {
      if (media.example !== undefined) row.push(jsonBlock(media.example));
      row.push(schemaView(media.schema));
    }
    return make("li", null, row);
  }

  // ----------------------------------------------------------------------------------------------------- operations

  const callers = (operation) => {
    const roles = operation["x-roles"] || [];
    return roles.includes("anonymous") ? "anybody" : roles.includes("customer") ? "signed in" : "staff";
  };

  function operationBody({ method, path, operation }) {
    const needsToken = (operation.security || []).length > 0 && !operation.security.some((one) => !Object.keys(one).length);
    const command = make("code");
    const languages = language.cloneNode(true);
    languages.addEventListener("change", () => {
      chosen = languages.value;
      document.dispatchEvent(new Event("sample"));
    });
    const form = new Form(operation);
    const button = make("button", { type: "button", onclick: () => copy(button, command.textContent) }, "Copy");
    const output = make("div", { class: "output", role: "status" });
    const go = make("button", { type: "submit", class: "main" }, "Send");

    function refresh() {
      languages.value = chosen;
      command.textContent = sample(method, form.request(path), needsToken);
    }
    async function submit(event) {
      event.preventDefault();
      go.disabled = true;
      try {
        output.replaceChildren(...answerView(await send(method, form.request(path))).filter(Boolean));
      } catch (error) {
        output.replaceChildren(make("p", { class: "verdict bad" }, `No answer: ${error.message}`));
      } finally {
        go.disabled = false;
      }
    }
    refresh();
    document.addEventListener("sample", refresh);
    return [
      make("div", { class: "about" }, prose(operation.description)),
      make("form", { class: "pair", oninput: refresh, onchange: refresh, onsubmit: submit },
        make("div", null, form.view()),
        make("div", null, make("div", { class: "row" }, heading("Try it"), languages),
          make("div", { class: "command" }, make("pre", { tabindex: "0" }, command), button),
          make("div", { class: "row" }, go, make("span", { class: "quiet" }, "sends it to this shop, for real")), output)),
      heading("Answers"),
      make("ul", { class: "answers" }, Object.entries(operation.responses).map((entry) => responseView(...entry))),
    ];
  }

  /** An operation as one line that opens; what is inside is made when it is opened first. */
  function operationView(entry) {
    const { method, path, operation } = entry;
    const view = make("details", { class: "operation", id: operation.operationId },
      make("summary", null, make("h3", null, make("span", { class: `method ${method}` }, method), code(path)),
        make("span", { class: "what" }, operation.summary), make("span", { class: "who" }, callers(operation))));
    entry.fill = () => {
      if (view.children.length === 1) view.append(make("div", { class: "inside" }, operationBody(entry)));
    };
    // Filled before it opens, so that nothing moves afterwards.
    view.firstChild.addEventListener("click", entry.fill);
    view.addEventListener("toggle", () => {
      if (view.open) history.replaceState(null, "", `#${view.id}`);
    });
    views.set(view.id, entry);
    entry.view = view;
    entry.link = make("li", null, make("a", { href: `#${view.id}`, title: operation.summary },
      make("span", { class: `method ${method}` }, method), make("span", { class: "path" }, path)));
    entry.text = [method, path, operation.operationId, operation.summary].join(" ").toLowerCase();
    return view;
  }

  function entriesOf(tag) {
    return Object.entries(api.paths).flatMap(([path, methods]) => Object.keys(methods)
      .filter((method) => METHODS.has(method) && methods[method].tags.includes(tag.name))
      .map((method) => ({ method: method.toUpperCase(), path, operation: methods[method] })));
  }

  function show() {
    const groups = api.tags.map((tag) => ({ tag, entries: entriesOf(tag) }));
    const status = byId("status");
    const introduction = make("section", { class: "introduction" },
      make("h1", null, `${api.info.title} API `, make("small", null, api.info.version)), prose(api.info.description),
      make("p", null, make("a", { href: "/openapi.json" }, "OpenAPI document"), " · ",
        make("a", { href: "/docs/problems" }, "All problems")));
    for (const group of groups) {
      group.view = make("section", { "aria-labelledby": `tag-${group.tag.name}` },
        make("h2", { id: `tag-${group.tag.name}` }, group.tag.name), prose(group.tag.description),
        group.entries.map(operationView));
      group.list = make("div", null, make("h2", null, group.tag.name),
        make("ul", null, group.entries.map((entry) => entry.link)));
    }
    status.textContent = "";
    byId("states").before(introduction);
    byId("main").append(...groups.map((group) => group.view));
    byId("nav").append(...groups.map((group) => group.list));
    byId("filter").addEventListener("input", () => filter(groups, introduction, status));
  }

  function filter(groups, introduction, status) {
    const wanted = words(byId("filter").value);
    let found = 0;
    for (const group of groups) {
      let shown = 0;
      for (const entry of group.entries) {
        const hit = wanted.every((word) => entry.text.includes(word));
        entry.view.hidden = entry.link.hidden = !hit;
        shown += hit;
      }
      group.view.hidden = group.list.hidden = !shown;
      found += shown;
    }
    introduction.hidden = byId("states").hidden = wanted.length > 0;
    status.textContent = wanted.length ? `${found} ${found === 1 ? "operation" : "operations"}` : "";
  }

  function openNamed() {
    const entry = views.get(decodeURIComponent(location.hash.slice(1)));
    if (!entry) return;
    entry.fill();
    entry.view.open = true;
    entry.view.scrollIntoView();
  }

  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName);
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      byId("filter").focus();
    }
  });
  window.addEventListener("hashchange", openNamed);
  fetch("/openapi.json", { credentials: "omit" })
    .then((answer) => (answer.ok ? answer.json() : Promise.reject(new Error(`status ${answer.status}`))))
    .then((read) => {
      api = read;
      show();
      openNamed();
    })
    .catch((error) => { byId("status").textContent = `/openapi.json cannot be read: ${error.message}.`; });
})();
