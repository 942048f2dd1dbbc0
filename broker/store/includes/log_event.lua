-- Add an entry to the log `control`, which keeps about as many as journal.KEEP_EVENTS says.
local function log_event(control, ...)
  redis.call('XADD', control, 'MAXLEN', '~', 10000, '*', ...)
end
