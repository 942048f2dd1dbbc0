#!lua flags=allow-oom
-- UPDATE_ENV: keep what has changed of an environment, and have every process read it anew.
-- KEYS  1 envs (hash: <id> -> record, changes -> how often one changed,
--       change:<n> -> which one did, of the last changes)
-- ARGV  1 id  2 record  3 changes to remember
-- reply 1 | 0 (it is so already, or there is none such any more)
local envs = KEYS[1]
local id, record, remembered = unpack(ARGV)
local known = redis.call('HGET', envs, id)
if not known or known == record then return 0 end
redis.call('HSET', envs, id, record)
local change = redis.call('HINCRBY', envs, 'changes', 1)
redis.call('HSET', envs, 'change:' .. change % remembered, id)
return 1
