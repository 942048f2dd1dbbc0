#!lua flags=allow-oom
-- LEAVE: a reader of the batches is gone for good; nothing is kept for it any more.
-- KEYS  1 batches (stream)  2 state (hash)  3 settings (hash)
-- ARGV  1 reader (consumer group)  2… further fields of `state` that were its own
-- reply 1 | 0 (no such reader)
local batches, state, settings = unpack(KEYS)
local reader = ARGV[1]
local left = 0
if redis.call('EXISTS', batches) == 1 then
  left = redis.call('XGROUP', 'DESTROY', batches, reader)
end
redis.call('HDEL', settings, 'shadow:' .. reader)
redis.call('HDEL', state, 'covered:' .. reader, 'unseen:' .. reader, 'joined:' .. reader)
for i = 2, #ARGV do redis.call('HDEL', state, ARGV[i]) end
return left
