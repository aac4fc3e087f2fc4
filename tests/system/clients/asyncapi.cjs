// Says what the validator of AsyncAPI finds in the document on standard input: one line for each error and warning.
const fs = require("fs");
const { Parser } = require("@asyncapi/parser");

const INFORMATION = 2;

new Parser().parse(fs.readFileSync(0, "utf8")).then(({ diagnostics, document }) => {
  const found = diagnostics.filter((one) => one.severity < INFORMATION);
  for (const one of found) console.log(`${one.code} at ${one.path.join("/")}: ${one.message}`);
  if (document === undefined && found.length === 0) console.log("it is no document");
});
