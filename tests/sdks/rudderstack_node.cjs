// An app with @rudderstack/rudder-sdk-node as it comes from npm; run by tests/test_sdks.py.
const { readFileSync } = require("node:fs");
const { createRequire } = require("node:module");
const { setTimeout: sleep } = require("node:timers/promises");

const task = JSON.parse(readFileSync(0, "utf8"));
const Analytics = createRequire(`${task.packages}/`)("@rudderstack/rudder-sdk-node");

async function main() {
  const analytics = new Analytics(task.key, {
    dataPlaneUrl: task.host,
    gzip: task.gzip,
    flushInterval: 100,
    logLevel: "none",
    retryCount: 50, // its own 3 are over in a second
    axiosRetryConfig: {
      retryDelay: () => 200,
      onRetry: () => console.log(JSON.stringify({ retrying: true })),
    },
    errorHandler: (error) => console.error(error), // without one a failed flush ends the process
  });
  const acknowledged = [];
  const failed = [];
  const answered = task.calls.map(async ([kind, said], index) => {
    await sleep(index * task.pace_s * 1000);
    if (said.timestamp) said.timestamp = new Date(said.timestamp);
    await new Promise((resolve) => {
      analytics[kind](said, (error) => {
        (error ? failed : acknowledged).push(said.messageId);
        resolve();
      });
    });
  });
  await Promise.all(answered);
  console.log(JSON.stringify({ acknowledged, failed }));
}

main();
