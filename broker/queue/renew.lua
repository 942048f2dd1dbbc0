#!lua flags=allow-oom
-- RENEW: keep a lease alive without counting a delivery, but only for who holds it: XCLAIM alone
-- would take it back.
-- KEYS  1 batches (stream)
-- ARGV  1 policy (consumer group)  2 consumer  3 step
-- reply "renewed" | "lost" (another consumer's by now, or committed)
local batches = KEYS[1]
local policy, consumer, step = unpack(ARGV)
local id = step .. '-0'
local pending = redis.call('XPENDING', batches, policy, id, id, 1)[1]
if not pending or pending[2] ~= consumer then return 'lost' end
redis.call('XCLAIM', batches, policy, consumer, 0, id, 'IDLE', 0, 'JUSTID')
return 'renewed'
