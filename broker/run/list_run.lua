#!lua flags=allow-oom
-- LIST_RUN: put a run on the list of runs, if there is room, even when Redis is full: its trainer
-- may free what fills it.
-- KEYS  1 lachesis:runs (hash: run -> when it came)
-- ARGV  1 run  2 now, seconds since 1970  3 runs that there may be, 0 for any number
-- reply 1 (it is on the list) | 0 (there is no room)
local runs = KEYS[1]
local run, now, most = ARGV[1], ARGV[2], tonumber(ARGV[3])
if redis.call('HEXISTS', runs, run) == 1 then return 1 end
if most > 0 and redis.call('HLEN', runs) >= most then return 0 end
redis.call('HSET', runs, run, now)
return 1
