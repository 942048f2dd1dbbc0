-- What waits in the queue, counted in the hash `state`: in all, of each environment, and of each
-- environment by the size of its groups.
local function add_to_queue(state, env, n, bytes)
  redis.call('HINCRBY', state, 'groups', 1)
  redis.call('HINCRBY', state, 'sequences', n)
  redis.call('HINCRBY', state, 'bytes', bytes)
  redis.call('HINCRBY', state, 'env_sequences:' .. env, n)
  redis.call('HINCRBY', state, 'env_bytes:' .. env, bytes)
  redis.call('HINCRBY', state, 'waiting:' .. env .. ':' .. n, 1)
end

local function take_from_queue(state, groups, sequences, bytes)
  redis.call('HINCRBY', state, 'groups', -groups)
  redis.call('HINCRBY', state, 'sequences', -sequences)
  redis.call('HINCRBY', state, 'bytes', string.format('%.0f', -bytes))
end

-- Of a counter of one environment, which goes when it is zero.
local function take_from_env(state, counter, amount)
  local left = redis.call('HINCRBY', state, counter, string.format('%.0f', -amount))
  if left == 0 then redis.call('HDEL', state, counter) end
end
