#!lua flags=allow-oom
-- UPDATE_ENV: keep what has changed of an environment, and have every process read it anew.
-- KEYS  1 envs (hash: <id> -> record, changes -> how often one changed)
-- ARGV  1 id  2 record
-- reply 1 | 0 (it is so already)
if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('HINCRBY', KEYS[1], 'changes', 1)
return 1
