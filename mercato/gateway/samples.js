// A request as a piece of a program, in each language: a shell with curl, Python, JavaScript.
"use strict";

(() => {
  const PLACEHOLDER = "ACCESS_TOKEN";
  const shell = (text) => `'${text.replace(/'/g, `'\\''`)}'`;
  const string = (text) => JSON.stringify(text);

  /** The JSON that a text is; undefined where it is none, as while it is being typed. */
  function parsed(text) {
    try {
      return JSON.parse(text);
    } catch {
      return undefined;
    }
  }

  const compact = (text) => (parsed(text) === undefined ? text : JSON.stringify(parsed(text)));

  /** A value of JSON as Python writes it; `by` is how far its lines are indented. */
  function pythonValue(value, by = "") {
    if (value === null) return "None";
    if (typeof value === "boolean") return value ? "True" : "False";
    if (typeof value !== "object") return string(value);
    const inner = `${by}    `;
    const parts = Array.isArray(value) ? value.map((part) => pythonValue(part, inner))
      : Object.entries(value).map(([name, part]) => `${string(name)}: ${pythonValue(part, inner)}`);
    const [open, close] = Array.isArray(value) ? "[]" : "{}";
    return parts.length ? `${open}\n${parts.map((part) => `${inner}${part},\n`).join("")}${by}${close}` : open + close;
  }

  /** The headers with the token: null where none is sent, "" for one that stands in for it. */
  const withToken = (headers, token) =>
    (token === null ? headers : { Authorization: `Bearer ${token || PLACEHOLDER}`, ...headers });

  function curl({ method, url, headers, body, token }) {
    const lines = [`curl -i${method === "GET" ? "" : ` -X ${method}`} ${shell(url)}`];
    if (token === "") lines.push('-H "Authorization: Bearer $TOKEN"');
    else if (token !== null) lines.push(`-H ${shell(`Authorization: Bearer ${token}`)}`);
    for (const [name, value] of Object.entries(headers)) lines.push(`-H ${shell(`${name}: ${value}`)}`);
    if (body !== undefined) lines.push(`-d ${shell(compact(body))}`);
    return lines.join(" \\\n  ");
  }

  function python({ method, url, headers, body, token }) {
    const all = withToken(headers, token);
    const lines = ["import json", "import urllib.error", "import urllib.request", "", "request = urllib.request.Request(",
      `    ${string(url)},`, `    method=${string(method)},`];
    if (Object.keys(all).length) lines.push(`    headers=${pythonValue(all, "    ")},`);
    if (body !== undefined) {
      const value = parsed(body);
      lines.push(value === undefined ? `    data=${string(body)}.encode(),` : `    data=json.dumps(${pythonValue(value, "    ")}).encode(),`);
    } else lines.shift();
    return [...lines, ")", "try:", "    with urllib.request.urlopen(request, timeout=30) as answer:",
      "        print(answer.status, answer.read().decode())", "except urllib.error.HTTPError as refusal:",
      "    print(refusal.code, refusal.read().decode())"].join("\n");
  }

  function javascript({ method, url, headers, body, token }) {
    const value = body === undefined ? undefined : parsed(body);
    const options = [`  method: ${string(method)},`,
      `  headers: ${JSON.stringify(withToken(headers, token), null, 2).replace(/\n/g, "\n  ")},`];
    if (value !== undefined) options.push(`  body: JSON.stringify(${JSON.stringify(value, null, 2).replace(/\n/g, "\n  ")}),`);
    else if (body !== undefined) options.push(`  body: ${string(body)},`);
    return [`const answer = await fetch(${string(url)}, {`, ...options, "});", "console.log(answer.status, await answer.text());"].join("\n");
  }

  globalThis.samples = { curl, Python: python, JavaScript: javascript };
})();
