#!lua flags=allow-oom
-- UPDATE_ENV: keep what has changed of an environment, and have every process read it anew.
-- KEYS  1 envs (hash: <id> -> record, changes -> how often one changed, change:<n> -> which one did, of the last changes)
-- ARGV  1 id  2 record  3 changes to remember
-- reply 1 | 0 (it is so already, or there is none such any more)
local record = redis.call('HGET', KEYS[1], ARGV[1])
if not record or record == ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
local change = redis.call('HINCRBY', KEYS[1], 'changes', 1)
redis.call('HSET', KEYS[1], 'change:' .. change % ARGV[3], ARGV[1])
return 1
