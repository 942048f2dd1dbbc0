#!lua flags=allow-oom
-- SET_POOL_RULE: make this the pool's rule, if the one that was judged is still the rule.
-- KEYS  1 rule:<pool> (stream)
-- ARGV  1 id of the rule judged ('0-0': there was none)  2 how many rules to keep, about  3… the rule's fields and values
-- reply id of the rule, which may be in force since the script was first sent | nil (another was made: judge again)
local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if newest and newest[1] ~= ARGV[1] then
  for j = 3, #ARGV do
    if newest[2][j - 2] ~= ARGV[j] then return nil end
  end
  return newest[1]
end
return redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*', unpack(ARGV, 3))
