#!lua flags=allow-oom
-- LEAVE: a reader of the batches is gone for good; nothing is kept for it any more.
-- KEYS  1 batches (stream)  2 state (hash)  3 settings (hash)
-- ARGV  1 reader (consumer group)  2… further fields of `state` that were its own
-- reply 1 | 0 (no such reader)
local left = 0
if redis.call('EXISTS', KEYS[1]) == 1 then left = redis.call('XGROUP', 'DESTROY', KEYS[1], ARGV[1]) end
redis.call('HDEL', KEYS[3], 'shadow:' .. ARGV[1])
redis.call('HDEL', KEYS[2], 'covered:' .. ARGV[1], 'unseen:' .. ARGV[1], 'joined:' .. ARGV[1])
for i = 2, #ARGV do redis.call('HDEL', KEYS[2], ARGV[i]) end
return left
