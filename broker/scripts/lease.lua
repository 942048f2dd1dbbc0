#!lua flags=allow-oom
-- LEASE: lend the consumer one batch: its own unfinished one, else one whose lease lapsed, else the next new one.
-- KEYS  1 batches (stream)  2 state (hash)
-- ARGV  1 policy (consumer group)  2 consumer  3 milliseconds after which another consumer's lease has lapsed (0: at once)
-- reply nil | {id, fields, deliveries}
-- Idempotent: a caller that lost the reply gets the same batch again. Reading it again renews the lease and counts as a
-- delivery.
local stream, policy, consumer = KEYS[1], ARGV[1], ARGV[2]
local function lent(id, fields)
  local pending = redis.call('XPENDING', stream, policy, id, id, 1)
  return {id, fields, pending[1][4]}
end

local own = redis.call('XREADGROUP', 'GROUP', policy, consumer, 'COUNT', 1, 'STREAMS', stream, '0')
if own and #own[1][2] > 0 then
  local id, fields = own[1][2][1][1], own[1][2][1][2]
  return lent(id, fields)
end
local lapsed = redis.call('XAUTOCLAIM', stream, policy, consumer, ARGV[3], '0', 'COUNT', 1)
if #lapsed[2] > 0 then return lent(lapsed[2][1][1], lapsed[2][1][2]) end
local new = redis.call('XREADGROUP', 'GROUP', policy, consumer, 'COUNT', 1, 'STREAMS', stream, '>')
if not new then return nil end
local id, fields = new[1][2][1][1], new[1][2][1][2]
local step = tonumber(string.match(id, '^%d+'))
if step > tonumber(redis.call('HGET', KEYS[2], 'delivered') or '0') then
  redis.call('HSET', KEYS[2], 'delivered', step)
end
return lent(id, fields)
