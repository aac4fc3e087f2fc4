// Takes each event of a shop once and in order, by a durable consumer of its own, until it is asked to stop.
//
// What it does with an event is to note its position, in a file that also says how far it is: effect and position are
// stored by one rename. Two rules make that exact, whatever happens to the server, the stream or this program:
//
// - A position that is not higher than the stored one is passed over. So a stream that was made again, and delivers
//   everything from its beginning, repeats nothing.
// - Messages have consecutive sequence numbers. Where one does not follow the last, the consumer is made again, behind
//   the last: redelivery after a lost connection may otherwise come behind later messages, and be passed over.

"use strict";

const fs = require("node:fs");
const { jetstream, jetstreamManager, AckPolicy, DeliverPolicy } = require("@nats-io/jetstream");
const { input, connected } = require("./shop.cjs");

const STREAM = "MERCATO_EVENTS";
const DURABLE = "positions";
const BATCH = 50;
const FETCH_MS = 1_000;
const PAUSE_MS = 200;

class Taken {
  constructor(file) {
    this.file = file;
    this.state = { position: 0, sequence: 0, stream: "", taken: [], passedOver: 0, failures: 0 };
    if (fs.existsSync(file)) this.state = JSON.parse(fs.readFileSync(file, "utf8"));
  }

  /** Stores a new state: after any crash the file has the old one or the new. */
  store(state) {
    const made = `${this.file}.new`;
    const descriptor = fs.openSync(made, "w");
    fs.writeSync(descriptor, JSON.stringify(state));
    fs.fsyncSync(descriptor);
    fs.closeSync(descriptor);
    fs.renameSync(made, this.file);
    this.state = state;
  }

  take(stream, message) {
    const position = Number(message.headers.get("Nats-Msg-Id"));
    const entry = message.json();
    if (entry.position !== position || message.subject !== `mercato.events.${entry.type}`) throw new Error("malformed");
    const at = { ...this.state, stream, sequence: message.seq };
    if (position <= this.state.position) {
      this.store({ ...at, passedOver: at.passedOver + 1 });
    } else {
      this.store({ ...at, position, taken: [...at.taken, position] });
    }
  }
}

/** Makes the consumer, behind what was taken from this very stream, and takes until something goes wrong. */
async function follow(connection, taken, isStopped) {
  const manager = await jetstreamManager(connection, { checkAPI: false });
  const { created: stream, state } = await manager.streams.info(STREAM);
  await manager.consumers.delete(STREAM, DURABLE).catch(() => undefined);
  // What is older than the stream keeps is missed in any case.
  let last = taken.state.stream === stream ? Math.max(taken.state.sequence, state.first_seq - 1) : 0;
  await manager.consumers.add(STREAM, {
    durable_name: DURABLE,
    ack_policy: AckPolicy.All,
    deliver_policy: last ? DeliverPolicy.StartSequence : DeliverPolicy.All,
    ...(last ? { opt_start_seq: last + 1 } : {}),
  });
  const consumer = await jetstream(connection, { checkAPI: false }).consumers.get(STREAM, DURABLE);
  let isFirst = last === 0;
  while (!isStopped()) {
    for await (const message of await consumer.fetch({ max_messages: BATCH, expires: FETCH_MS })) {
      if (message.seq !== last + 1 && !isFirst) return;
      taken.take(stream, message);
      message.ack();
      last = message.seq;
      isFirst = false;
    }
    await consumer.info(); // fails where the consumer is gone, with its stream or alone
  }
}

async function main() {
  const given = await input();
  const taken = new Taken(given.file);
  let isStopped = false;
  process.on("SIGTERM", () => (isStopped = true));
  const connection = await connected(given);
  while (!isStopped) {
    try {
      await follow(connection, taken, () => isStopped);
    } catch (error) {
      taken.state.failures += 1;
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
    }
  }
  await connection.close();
}

main().catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
