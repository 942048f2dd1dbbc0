-- Whether a replica is a member, and acts in the newest epoch of the newest generation.
local function is_current(replicas, members, id, generation, epoch)
  local newest = redis.call('HMGET', replicas, 'generation', 'epoch')
  if newest[1] ~= generation or newest[2] ~= epoch then return false end
  return redis.call('ZSCORE', members, id) and true
end

-- Whether a step's batch is lent to all replicas of the policy together.
local function is_lent_to_replicas(batches, policy, step)
  local id = step .. '-0'
  local pending = redis.call('XPENDING', batches, policy, id, id, 1)[1]
  return pending and pending[2] == 'replicas'
end
