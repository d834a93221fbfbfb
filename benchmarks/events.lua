-- For wrk: each request a fresh event. `wrk ... URL -- SEED PIECE PIECE PIECE`, see events.py.
-- The constant parts are built once, so that a request costs one concatenation.

local threads = 0

function setup(thread)
  thread:set("number", threads)
  threads = threads + 1
end

local users = {}
local head, middle, tail
local random, format = math.random, string.format

function init(args)
  math.randomseed(tonumber(args[1]) + number * 2 ^ 32)
  for user = 0, 999 do
    users[user] = format("%04d", user)
  end
  local length = #args[2] + 36 + #args[3] + 4 + #args[4]
  head = "POST /api/public/apps/track HTTP/1.1\r\nHost: " .. wrk.headers["Host"]
    .. "\r\nContent-Type: application/json\r\nContent-Length: " .. length .. "\r\n\r\n" .. args[2]
  middle, tail = args[3], args[4]
end

function request()
  local id = format(
    "%08x-%04x-4%03x-a%03x-%06x%06x",
    random(0, 0xffffffff), random(0, 0xffff), random(0, 0xfff), random(0, 0xfff),
    random(0, 0xffffff), random(0, 0xffffff)
  )
  return head .. id .. middle .. users[random(0, 999)] .. tail
end

function done(summary, latency)
  local errors = summary.errors
  io.write(format(
    '{"answered":%d,"seconds":%.6f,"failed":%d,"p50_ms":%.3f,"p99_ms":%.3f}\n',
    summary.requests, summary.duration / 1e6,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3
  ))
end
