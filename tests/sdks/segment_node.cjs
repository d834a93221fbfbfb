// An app with @segment/analytics-node as it comes from npm; run by tests/test_sdks.py.
const { readFileSync } = require("node:fs");
const { createRequire } = require("node:module");
const { setTimeout: sleep } = require("node:timers/promises");

const task = JSON.parse(readFileSync(0, "utf8"));
const { Analytics } = createRequire(`${task.packages}/`)("@segment/analytics-node");

async function main() {
  const { origin, pathname } = new URL(task.host);
  const analytics = new Analytics({
    writeKey: task.key,
    host: origin,
    path: `${pathname === "/" ? "" : pathname}/v1/batch`,
    flushInterval: 100,
  });
  analytics.on("http_request", ({ headers }) => {
    if (headers["X-Retry-Count"]) console.log(JSON.stringify({ retrying: true }));
  });
  const acknowledged = [];
  const failed = [];
  for (const [kind, said] of task.calls) {
    if (said.timestamp) said.timestamp = new Date(said.timestamp);
    analytics[kind](said, (error) => {
      if (error) console.error(error);
      (error ? failed : acknowledged).push(said.messageId);
    });
    await sleep(task.pace_s * 1000);
  }
  await analytics.closeAndFlush();
  console.log(JSON.stringify({ acknowledged, failed }));
}

main();
