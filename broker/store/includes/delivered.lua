--- @include entries
-- Have the batches up to a step count as delivered: 1 | 0 (they did already).
-- What is undelivered still is counted anew, so that nothing that was deleted by hand counts for
-- ever.
local function deliver(batches, state, step)
  local function number(field) return tonumber(redis.call('HGET', state, field) or '') or 0 end
  if step <= number('delivered') then return 0 end
  local formed = number('formed')
  local groups, sequences = 0, 0
  if formed > step then
    for _, entry in ipairs(redis.call('XRANGE', batches, (step + 1) .. '-0', '+')) do
      local _, count = string.gsub(value_of(entry[2], 'gids') or '', '%S+', '')
      groups = groups + count
      sequences = sequences + (tonumber(value_of(entry[2], 'n') or '') or 0)
    end
  end
  redis.call('HSET', state, 'delivered', step, 'undelivered_groups', groups,
    'undelivered_sequences', string.format('%.0f', sequences))
  return 1
end
