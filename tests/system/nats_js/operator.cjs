// Lists and inspects all services of a shop, and calls one operation, with the official client.

"use strict";

const { Svcm } = require("@nats-io/services");
const { input, connected, call } = require("./shop.cjs");

async function all(answers) {
  const found = [];
  for await (const one of await answers) found.push(one);
  return found;
}

async function main() {
  const given = await input();
  const connection = await connected(given);
  const client = new Svcm(connection).client({ strategy: "timer", maxWait: given.listMs });
  const result = { ping: await all(client.ping()), info: await all(client.info()), stats: await all(client.stats()) };
  result.call = await call(connection, given, given.operation, given.requests);
  result.asAnother = await call(connection, { ...given, user: "gateway" }, given.operation, given.requests);
  await connection.close();
  console.log(JSON.stringify(result));
}

main().catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
