#!lua flags=allow-oom
-- REQUEUE: put a dead letter back at the end of the queue.
-- KEYS  1 dead (stream)  2 groups (stream)  3 blob:<gid> (string)  4 state (hash)
-- ARGV  1 its id in `dead`  2 env  3 n  4 bytes
--       5… the queue entry's fields and values, read from the blob
-- reply "requeued" | "gone" (it is no dead letter any more) | "noblob"
--- @include counters
local dead, groups, blob, state = unpack(KEYS)
local id, env, n, bytes = unpack(ARGV, 1, 4)
local ENTRY = 5
if #redis.call('XRANGE', dead, id, id) == 0 then return 'gone' end
if redis.call('EXISTS', blob) == 0 then return 'noblob' end

redis.call('XADD', groups, '*', unpack(ARGV, ENTRY))
redis.call('XDEL', dead, id)
redis.call('HINCRBY', state, 'dead', -1)
add_to_queue(state, env, n, bytes)
return 'requeued'
