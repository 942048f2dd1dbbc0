--- @include entries
--- @include refused
-- A policy has trained a batch, and its ledger says so: acknowledge it, and note the step of its
-- groups.
local function acknowledge(batches, state, trained, policy, step, batch)
  redis.call('XACK', batches, policy, step .. '-0')
  redis.call('HINCRBY', state, 'committed:' .. policy, 1)
  local gids = batch and value_of(batch[2], 'gids')
  for gid in each_gid(gids) do redis.call('HSET', trained, gid, step) end
end

-- Write the letters of `k` sequences that the step was trained without, which begin at ARGV[first],
-- four fields and values each; the stream then keeps as many as `most`.
local function note_untrainable(refused, state, k, first, most)
  if k == 0 then return end
  for i = first, first + 8 * (k - 1), 8 do
    redis.call('XADD', refused, '*', unpack(ARGV, i, i + 7))
  end
  redis.call('HINCRBY', state, 'untrainable', k)
  trim_letters(refused, most, 0)
end
