// An app with @dittofeed/sdk-node as it comes from npm; run by tests/test_sdks.py.
const { readFileSync } = require("node:fs");
const { createRequire } = require("node:module");

const task = JSON.parse(readFileSync(0, "utf8"));
const { DittofeedSdk } = createRequire(`${task.packages}/`)("@dittofeed/sdk-node");

async function main() {
  await DittofeedSdk.init({ writeKey: task.key, host: task.host });
  const acknowledged = [];
  const failed = [];
  for (const [kind, said] of task.calls) {
    // Null stands for an id that is set and undefined, which JSON cannot say.
    DittofeedSdk[kind]({ ...said, messageId: said.messageId ?? undefined });
    try {
      await DittofeedSdk.flush();
      acknowledged.push(said.messageId);
    } catch (error) {
      console.error(error);
      failed.push(said.messageId);
    }
  }
  console.log(JSON.stringify({ acknowledged, failed }));
}

main();
