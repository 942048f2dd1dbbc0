--- @include entries
-- The consumer groups of a stream: what XINFO says of each, and as `read` the step it was given
-- last.
local function readers_of(batches)
  local readers = {}
  if redis.call('EXISTS', batches) == 0 then return readers end
  for i, info in ipairs(redis.call('XINFO', 'GROUPS', batches)) do
    readers[i] = map(info)
    readers[i].read = step_of(readers[i]['last-delivered-id'])
  end
  return readers
end

-- How a shadow reads, and how many batches it may be behind; nil where the policy is none.
local function shadow_rule(settings, policy)
  local rule = redis.call('HGET', settings, 'shadow:' .. policy) or ''
  local kind, behind = string.match(rule, '^(%a+) (%d+)$')
  return kind, tonumber(behind)
end
