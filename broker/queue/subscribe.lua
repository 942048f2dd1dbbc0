#!lua flags=allow-oom
-- SUBSCRIBE: make a policy a reader of all batches that are still there; Redis may be full when its
-- trainer comes.
-- KEYS  1 batches (stream)  2 state (hash)  3 settings (hash)
-- ARGV  1 policy (consumer group)
--       2 how it reads as a shadow, '<lossless or lossy> <batches it may be behind>'; '' if it is
--       none
-- reply 1 if it is new, else 0
-- For one that comes late it is noted how many groups had come and gone by then, and which step was
-- formed last.
--- @include readers
local batches, state, settings = unpack(KEYS)
local policy, rule = unpack(ARGV)

local function is_reader()
  for _, reader in ipairs(readers_of(batches)) do
    if reader.name == policy then return true end
  end
  return false
end

-- Groups that were accepted, and are neither queued, nor in a batch that is kept, nor dead letters.
local function count_gone()
  local counts = redis.call('HMGET', state, 'accepted', 'groups', 'dead', 'purged')
  local gone = tonumber(counts[1] or '0')
  for i = 2, 4 do gone = gone - tonumber(counts[i] or '0') end
  for _, batch in ipairs(redis.call('XRANGE', batches, '-', '+')) do
    gone = gone - select(2, string.gsub(value_of(batch[2], 'gids') or '', '%S+', ''))
  end
  return gone
end

local is_new = not is_reader()
local formed = redis.call('HGET', state, 'formed') or '0'
if is_new and tonumber(formed) > 0 then
  redis.call('HSET', state, 'unseen:' .. policy, string.format('%.0f', count_gone()),
    'joined:' .. policy, formed)
end
if rule == '' then
  redis.call('HDEL', settings, 'shadow:' .. policy)
else
  redis.call('HSET', settings, 'shadow:' .. policy, rule)
end
if is_new then redis.call('XGROUP', 'CREATE', batches, policy, '0', 'MKSTREAM') end
return is_new and 1 or 0
