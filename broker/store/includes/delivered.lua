-- Have the batches up to a step count as delivered: 1 | 0 (they did already).
-- What is undelivered still is counted anew, so that nothing that was deleted by hand counts for ever.
local function deliver(batches, state, step)
  if step <= tonumber(redis.call('HGET', state, 'delivered') or '0') then return 0 end
  local groups, sequences, formed = 0, 0, tonumber(redis.call('HGET', state, 'formed') or '0')
  for _, entry in ipairs(formed > step and redis.call('XRANGE', batches, (step + 1) .. '-0', '+') or {}) do
    for j = 1, #entry[2], 2 do
      if entry[2][j] == 'gids' then groups = groups + select(2, string.gsub(entry[2][j + 1], '%S+', '')) end
      if entry[2][j] == 'n' then sequences = sequences + (tonumber(entry[2][j + 1]) or 0) end
    end
  end
  redis.call('HSET', state, 'delivered', step, 'undelivered_groups', groups, 'undelivered_sequences', string.format('%.0f', sequences))
  return 1
end
