// What a program in JavaScript needs to call an operation of a shop over NATS: a token, and MessagePack.

"use strict";

const crypto = require("node:crypto");
const { connect, headers } = require("@nats-io/transport-node");
const { encode, decode } = require("@msgpack/msgpack");

const TOKEN_SECONDS = 60;
const CALL_MS = 10_000;
const PKCS8_ED25519 = Buffer.from("302e020100300506032b657004220420", "hex");

/** What the test has written on standard input, as JSON. */
async function input() {
  let text = "";
  for await (const part of process.stdin) text += part;
  return JSON.parse(text);
}

/** A connection of one user. Its inboxes have to begin as its permissions say. */
function connected({ url, user, password }) {
  return connect({
    servers: url,
    user,
    pass: password,
    inboxPrefix: `_INBOX.${user}`,
    maxReconnectAttempts: -1,
    reconnectTimeWait: 100,
    waitOnFirstConnect: true,
  });
}

/** A token of `caller` for the operations of `service`: a JWT that its Ed25519 key has signed. */
function token(caller, seed, service) {
  const key = crypto.createPrivateKey({
    key: Buffer.concat([PKCS8_ED25519, Buffer.from(seed, "hex")]),
    format: "der",
    type: "pkcs8",
  });
  const now = Math.floor(Date.now() / 1000);
  const parts = [
    { alg: "EdDSA", typ: "mercato-service+jwt", kid: caller },
    { iss: caller, aud: service, iat: now, exp: now + TOKEN_SECONDS },
  ];
  const signed = parts.map((part) => Buffer.from(JSON.stringify(part)).toString("base64url")).join(".");
  return `${signed}.${crypto.sign(null, Buffer.from(signed), key).toString("base64url")}`;
}

/** Calls an operation with a batch of requests, in the role of staff; its outcomes, in the same order. */
async function call(connection, { user, seed }, operation, requests) {
  const sent = headers();
  sent.set("authorization", token(user, seed, operation.split(".")[0]));
  sent.set("mercato-remaining-ms", String(CALL_MS));
  const batch = requests.map((body) => ({
    body,
    actor: { role: "staff", id: 0 },
    remaining_ms: CALL_MS,
    trace_id: "",
    request_id: "",
  }));
  const answer = await connection.request(`mercato.${operation}`, encode(batch), { timeout: CALL_MS, headers: sent });
  const refused = answer.headers?.get("mercato-not-started") || answer.headers?.get("Nats-Service-Error-Code");
  return refused ? { refused } : { outcomes: decode(answer.data) };
}

module.exports = { input, connected, call };
