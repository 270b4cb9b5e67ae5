-- The scripts of the ledger, each atomic. Redis gets each function of `script` and `fenced` as a script of its own:
-- everything above the first one, that function, and `return run()`. One script with all functions would define all of
-- them at each call, 10 of a claim's 40 us. ARGV[1] is the function's name, the rest are its arguments. All times follow
-- the server's clock. Functions of `fenced` first check the dispatcher's fencing token.
--
-- An image's id is JOB:INDEX. All keys are on one primary (no cluster). Times are Unix times, as text.
--
-- key                     type    meaning                                                          lifetime
-- cf:jobs                 zset    job -> time of creation                                          pruned with the job
-- cf:open                 set     jobs that are not closed                                         until closed
-- cf:job:JOB              hash    the fields of `Job` (jobs/job.py), and lister: token of the      keep_days after closing
--                                 process that lists it
-- cf:job:JOB:bits         bits    four bits per image: its state (see STATE)                       as the job
-- cf:job:JOB:unsure       bits    one bit per image: its version may differ from the manifest's    as the job
-- cf:job:JOB:parts        hash    manifest part -> {first, last, count}                            as the job
-- cf:job:JOB:rows         list    rows of a live job that are in no part yet: {key, etag, size}    as the job
-- cf:job:JOB:failures     hash    index -> {key, code, message, tries, at, worker}; the rest: S3   as the job
-- cf:job:JOB:again        bits    one bit per image: reopened, to be fed once more                 as the job
-- cf:job:JOB:reopened     bits    eight bits per image: how often it was reopened; only if the     as the job
--                                 webhook gets image events
-- cf:job:JOB:remarks      hash    index -> {key, review, figures, rules}: the first MAX_REMARKS    as the job
-- cf:job:JOB:tally        hash    sums over done and skipped images: name -> count (`JobStats`)    as the job
-- cf:waiting              zset    queued image -> deadline of its message                          window only
-- cf:leased               zset    claimed image -> end of its lease                                window only
-- cf:retry                zset    image -> time of its retry                                       window only
-- cf:entry                hash    image -> queue, newline, message with %TAG%, %QUEUE% to fill in  window only
-- cf:owner                hash    image -> token of its claim, space, output                       while claimed
-- cf:claim                hash    output -> image that may write it                                while claimed
-- cf:published            hash    image -> time when its message was published                     window only
-- cf:tries                hash    image -> failed attempts                                         window only
-- cf:vanished             hash    image -> claims whose worker vanished; two make it a suspect     window only
-- cf:computing            set     images that a worker computes in isolation                       while claimed
-- cf:died                 hash    image -> workers that were killed while they did so              window only
-- cf:blamed               hash    image -> last error that ended a worker with it, if known        window only
-- cf:watch:WATCH          hash    swept: start of its last complete listing                        30 days unused
-- cf:watch:WATCH:seen     hash    digest of a key -> ETag of the version that a job got            a day, and until swept
-- cf:watch:WATCH:when     zset    digest of a key -> time when a job got it                        as :seen
-- cf:outbox               zset    receiver (SHA-1 of its URL) -> time of its next delivery         while it has events
-- cf:outbox:RECEIVER      zset    event (JOB or JOB:INDEX) -> time of its next delivery            until delivered or given up
-- cf:outbox:tries         hash    event -> failed deliveries                                       as its event
-- cf:outbox:size          string  number of events                                                 for ever
-- cf:api:once:DIGEST      string  digest of the body and job of an Idempotency-Key                 a day
-- cf:api:calls:KEY:MINUTE string  calls of an API key in a minute                                  two minutes
-- cf:api:lists:JOB        string  API process that lists the job                                   its lease
-- cf:tag                  string  last delivery tag                                                for ever
-- cf:workers              zset    worker -> time of its last heartbeat                             a day after the last one
-- cf:worker:NODE          hash    fields of a worker's heartbeat                                   three heartbeats
-- cf:dispatcher           string  the active dispatcher                                            its lock's time
-- cf:room                 string  empty: written to test whether Redis is full                     for ever
-- cf:dispatcher:epoch     string  fencing token: grows with each change of the active dispatcher   for ever
-- live.M backfill.M suspect.M, unacked*, _kombu.*  belong to Celery; scripts only LPUSH to the first three

local STATE = {open = 0, done = 1, failed = 2, skipped = 3, cancelled = 4, review = 5}
local MAX_REMARKS = 10000
local RECEIVER_LIMIT, OUTBOX_LIMIT = 20000, 100000  -- most events of one receiver (about 2 MB), and of all
local SUSPECT_AFTER = 2
local PRUNED = 10
local WATCH_DAYS = 30  -- a watch that did not run for so long starts anew
local KEYS_OF_JOB = {'', ':bits', ':unsure', ':parts', ':rows', ':failures', ':again', ':reopened', ':remarks', ':tally'}
local call = redis.call
local clock = call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000

local function at(seconds) return string.format('%.3f', seconds) end

local function split(id)
  local job, index = string.match(id, '^(.+):(%d+)$')
  return job, index
end

local function state_of(job, index)
  return call('BITFIELD', 'cf:job:' .. job .. ':bits', 'GET', 'u4', '#' .. index)[1]
end

local function is_suspect(id)
  return tonumber(call('HGET', 'cf:vanished', id) or 0) >= SUSPECT_AFTER
end

local function publish(id, queue, message)
  local tag = id .. ':' .. call('INCR', 'cf:tag')
  message = string.gsub(message, '%%TAG%%', tag, 1)
  call('HSET', 'cf:published', id, at(now))
  call('LPUSH', queue, (string.gsub(message, '%%QUEUE%%', queue, 1)))
end

local function enter(id, queue, message, lease)
  if call('HSET', 'cf:entry', id, queue .. '\n' .. message) == 1 then
    call('HINCRBY', 'cf:job:' .. split(id), 'window', 1)
  end
  call('ZADD', 'cf:waiting', at(now + lease), id)
  publish(id, queue, message)
end

local function requeue(id, lease)
  local queue, message = string.match(call('HGET', 'cf:entry', id), '^([^\n]*)\n(.*)$')
  if is_suspect(id) then queue = string.gsub(queue, '^%a+%.', 'suspect.', 1) end
  call('ZADD', 'cf:waiting', at(now + lease), id)
  publish(id, queue, message)
end

-- Queue live images in the order of their indexes. rows: queue, message, row ...
local function enter_live(job, lease, first, rows)
  for i = 1, #rows, 3 do
    enter(job .. ':' .. string.format('%d', first + (i - 1) / 3), rows[i], rows[i + 1], lease)
    call('RPUSH', 'cf:job:' .. job .. ':rows', rows[i + 2])
  end
  local count = #rows / 3
  for _, name in ipairs({'total', 'cursor', 'unrecorded'}) do call('HINCRBY', 'cf:job:' .. job, name, count) end
end

local function drop_claim(id)
  local owner = call('HGET', 'cf:owner', id)
  if owner then
    local output = string.match(owner, '^%S+ (.*)$')
    if call('HGET', 'cf:claim', output) == id then call('HDEL', 'cf:claim', output) end
    call('HDEL', 'cf:owner', id)
  end
  call('ZREM', 'cf:leased', id)
  call('SREM', 'cf:computing', id)
end

local function leave_window(id)
  drop_claim(id)
  call('ZREM', 'cf:waiting', id)
  call('ZREM', 'cf:retry', id)
  local job = 'cf:job:' .. split(id)
  if call('HDEL', 'cf:entry', id) == 1 and call('EXISTS', job) == 1 then call('HINCRBY', job, 'window', -1) end
  call('HDEL', 'cf:published', id)
  call('HDEL', 'cf:tries', id)
  call('HDEL', 'cf:vanished', id)
  call('HDEL', 'cf:blamed', id)
  call('HDEL', 'cf:died', id)
end

local function make_final(job, index, state)
  local key = 'cf:job:' .. job
  if state_of(job, index) ~= STATE.open then return false end
  call('BITFIELD', key .. ':bits', 'SET', 'u4', '#' .. index, state)
  if state == STATE.review then
    call('HINCRBY', key, 'review', 1)
    state = STATE.done
  end
  for name, value in pairs(STATE) do
    if value == state then call('HINCRBY', key, name, 1) end
  end
  return true
end

local function receiver_of(job) return redis.sha1hex(call('HGET', 'cf:job:' .. job, 'webhook') or '') end

local function is_full(receiver)
  if call('ZCARD', 'cf:outbox:' .. receiver) >= RECEIVER_LIMIT then return true end
  return tonumber(call('GET', 'cf:outbox:size') or 0) >= OUTBOX_LIMIT
end

-- Make an event due now. Return false, and change nothing, for an image's event above the limit.
local function make_due(receiver, event)
  local outbox = 'cf:outbox:' .. receiver
  if split(event) and is_full(receiver) and not call('ZSCORE', outbox, event) then return false end
  call('INCRBY', 'cf:outbox:size', call('ZADD', outbox, at(now), event))
  call('ZADD', 'cf:outbox', 'LT', at(now), receiver)
  call('HDEL', 'cf:outbox:tries', event)
  return true
end

-- Add an event if the job has that webhook. Above the limit it is only counted as undelivered; a replay adds it.
local function add_event(job, event, flag)
  local key = 'cf:job:' .. job
  if call('HEXISTS', key, flag) == 0 then return end
  if not make_due(receiver_of(job), event) then call('HINCRBY', key, 'undelivered', 1) end
end

-- Schedule a receiver's next delivery, after all receivers that are due now.
local function schedule_receiver(receiver)
  local due = call('ZRANGE', 'cf:outbox:' .. receiver, 0, 0, 'WITHSCORES')[2]
  if due then
    call('ZADD', 'cf:outbox', at(math.max(tonumber(due), now)), receiver)
  else
    call('ZREM', 'cf:outbox', receiver)
  end
end

local function count_lost_worker(id)
  local times = call('HINCRBY', 'cf:vanished', id, 1)
  if call('SREM', 'cf:computing', id) == 1 then call('HINCRBY', 'cf:died', id, 1) end
  drop_claim(id)
  return times
end

-- Make an image of a cancelled job final; return whether it is one. Not for a leased image.
local function finish_if_cancelled(id)
  local job, index = split(id)
  if call('HEXISTS', 'cf:job:' .. job, 'cancelled_at') == 0 then return false end
  make_final(job, index, STATE.cancelled)
  leave_window(id)
  return true
end

local function owns(id, token)
  local owner = call('HGET', 'cf:owner', id)
  return owner and string.match(owner, '^(%S+) ') == token
end

-- Heartbeats of live workers: {node, {name, value ...}} ...
local function workers_alive()
  local alive = {}
  for _, node in ipairs(call('ZRANGE', 'cf:workers', 0, -1)) do
    local facts = call('HGETALL', 'cf:worker:' .. node)
    if #facts > 0 then alive[#alive + 1] = {node, facts} end
  end
  return alive
end

-- Acknowledged failures no longer pause the job.
local function acknowledge_failures(key)
  local final = 0
  for _, name in ipairs({'done', 'failed', 'skipped', 'cancelled'}) do
    final = final + tonumber(call('HGET', key, name) or 0)
  end
  call('HSET', key, 'acknowledged_final', final, 'acknowledged_failed', call('HGET', key, 'failed') or 0)
end

local function extend_watch(watch)
  for _, suffix in ipairs({'', ':seen', ':when'}) do
    call('EXPIRE', 'cf:watch:' .. watch .. suffix, WATCH_DAYS * 86400)
  end
end

local function is_active_epoch(epoch)
  return call('GET', 'cf:dispatcher:epoch') == epoch
end

-- Create a job. fields: name, value ... Return 0, and change nothing, if it exists.
local function create(job, ...)
  if call('EXISTS', 'cf:job:' .. job) == 1 then return 0 end
  call('HSET', 'cf:job:' .. job, 'created', at(now), 'total', 0, 'cursor', 0, 'parts', 0, ...)
  call('ZADD', 'cf:jobs', at(now), job)
  call('SADD', 'cf:open', job)
  return 1
end

local script = {}
local fenced = {}

local function run()
  local name = ARGV[1]
  if script[name] then return script[name](unpack(ARGV, 2)) end
  if not is_active_epoch(ARGV[2]) then return redis.error_reply('FENCED another dispatcher is active') end
  return fenced[name](unpack(ARGV, 3))
end

function script.create(job, ...) return create(job, ...) end

-- Become the job's lister; the previous one can't add parts any more.
function script.take_listing(job, lister)
  if call('EXISTS', 'cf:job:' .. job) == 1 then call('HSET', 'cf:job:' .. job, 'lister', lister) end
end

-- Count the next part of the manifest, which is in S3. Idempotent. Return 0 when another process lists the job, or another
-- part was expected. skipped: how many of its images are skipped; states: of all, as bytes of :bits from `offset` on.
function script.add_part(job, lister, part, count, first, last, skipped, offset, states, made)
  local key, entry = 'cf:job:' .. job, cjson.encode({first, last, tonumber(count)})
  if call('HGET', key, 'lister') ~= lister or call('HEXISTS', key, 'listed') == 1 then return 0 end
  if call('HGET', key, 'parts') ~= part then return call('HGET', key .. ':parts', part) == entry and 1 or 0 end
  call('HSET', key .. ':parts', part, entry)
  call('HINCRBY', key, 'parts', 1)
  call('HINCRBY', key, 'total', count)
  if tonumber(skipped) > 0 then
    call('SETRANGE', key .. ':bits', offset, states)
    call('HINCRBY', key, 'skipped', skipped)
    call('HINCRBY', key .. ':tally', 'made ' .. made, skipped)
  end
  return 1
end

function script.listed(job)
  if call('EXISTS', 'cf:job:' .. job) == 1 then call('HSET', 'cf:job:' .. job, 'listed', 1) end
end

-- Feed nothing until the job is unpaused.
function script.pause(job, reason)
  if call('EXISTS', 'cf:job:' .. job) == 1 then call('HSET', 'cf:job:' .. job, 'paused', reason) end
end

-- Acknowledge the sample that was fed and the failures so far: neither pauses the job again.
function script.unpause(job)
  local key = 'cf:job:' .. job
  local sample = call('HGET', key, 'sample')
  if sample and tonumber(call('HGET', key, 'cursor')) >= tonumber(sample) then call('HDEL', key, 'sample') end
  if call('HDEL', key, 'paused') == 0 then return 0 end
  acknowledge_failures(key)
  return 1
end

-- Change how a job is fed: name, value ... An empty value removes the limit.
function script.tune(job, ...)
  local key, args = 'cf:job:' .. job, {...}
  if call('EXISTS', key) == 0 or call('HEXISTS', key, 'closed') == 1 then return 0 end
  for i = 1, #args, 2 do
    if args[i + 1] == '' then call('HDEL', key, args[i]) else call('HSET', key, args[i], args[i + 1]) end
  end
  return 1
end

-- Stop claiming and listing. Return 0 when the job is closed.
function script.cancel(job)
  local key = 'cf:job:' .. job
  if call('EXISTS', key) == 0 or call('HEXISTS', key, 'closed') == 1 then return 0 end
  if call('HEXISTS', key, 'cancelled_at') == 0 then
    call('HSET', key, 'cancelled_at', at(now), 'listed', 1, 'cancel_cursor', 0)
    call('HDEL', key, 'paused', 'reopened')
    call('UNLINK', key .. ':again')
  end
  return 1
end

-- Reopen final images whose state's digit is in `states`: index ... A closed job is open again. Return how many; -1 when
-- the job is cancelled.
function script.reopen(job, states, ...)
  local key, args, changed = 'cf:job:' .. job, {...}, 0
  if call('EXISTS', key) == 0 then return 0 end
  if call('HEXISTS', key, 'cancelled_at') == 1 then return -1 end
  local has_image_events = call('HEXISTS', key, 'webhook_images') == 1
  for i = 1, #args do
    local state = state_of(job, args[i])
    if state ~= STATE.open and string.find(states, tostring(state), 1, true) then
      call('BITFIELD', key .. ':bits', 'SET', 'u4', '#' .. args[i], STATE.open)
      if state == STATE.review then
        call('HINCRBY', key, 'review', -1)
        state = STATE.done
      end
      for name, value in pairs(STATE) do
        if value == state then call('HINCRBY', key, name, -1) end
      end
      call('HDEL', key .. ':failures', args[i])
      call('SETBIT', key .. ':again', args[i], 1)
      call('SETBIT', key .. ':unsure', args[i], 1)
      if has_image_events then call('BITFIELD', key .. ':reopened', 'INCRBY', 'u8', '#' .. args[i], 1) end
      call('HINCRBY', key, 'reopened', 1)
      changed = changed + 1
    end
  end
  if changed > 0 then
    acknowledge_failures(key)
    call('HDEL', key, 'closed')
    call('SADD', 'cf:open', job)
    for _, suffix in ipairs(KEYS_OF_JOB) do call('PERSIST', key .. suffix) end
  end
  return changed
end

-- Return the first `limit` reopened images that wait to be fed.
function script.to_feed_again(job, limit)
  local found, from = {}, 0
  while #found < tonumber(limit) do
    local index = call('BITPOS', 'cf:job:' .. job .. ':again', 1, from, -1, 'BIT')
    if index < 0 then break end
    found[#found + 1], from = index, index + 1
  end
  return found
end

-- Restore final states that S3 proves, of a job that Redis lost: index, state ... Skips images in the window. Return how
-- many changed.
function script.restore(job, ...)
  local args, changed = {...}, 0
  if call('EXISTS', 'cf:job:' .. job) == 0 then return 0 end
  for i = 1, #args, 2 do
    local fed = call('HEXISTS', 'cf:entry', job .. ':' .. args[i]) == 1
    if not fed and make_final(job, args[i], tonumber(args[i + 1])) then changed = changed + 1 end
    call('SETBIT', 'cf:job:' .. job .. ':unsure', args[i], 1)
  end
  return changed
end

-- Recount a job's images by state, find entries of final images in the window, and correct both (repair: 1). Return the
-- counts (COUNTED), the stored counts, and the images. Takes 0.003 s per million if most states are equal, else 0.07 s.
function script.check(job, repair)
  local COUNTED = {'done', 'failed', 'skipped', 'cancelled', 'review', 'window'}
  local key, total = 'cf:job:' .. job, tonumber(call('HGET', 'cf:job:' .. job, 'total'))
  local bits, of = string.sub(call('GET', key .. ':bits') or '', 1, math.ceil(total / 2)), {}
  for state = 0, 15 do of[state] = 0 end
  while #bits > 0 do  -- count all bytes equal to the first at once: few values differ, and Redis blocks meanwhile
    local byte = string.byte(bits)
    local char = string.char(byte)
    local pattern = byte == 0 and '%z' or string.find(char, '%w') and char or '%' .. char
    local rest = string.gsub(bits, pattern .. '+', '')
    for _, state in ipairs({byte % 16, math.floor(byte / 16)}) do of[state] = of[state] + #bits - #rest end
    bits = rest
  end
  local entries, left = 0, {}
  for _, id in ipairs(call('HKEYS', 'cf:entry')) do
    local owner, index = split(id)
    if owner == job then
      if tonumber(index) >= total or state_of(job, index) ~= STATE.open then
        left[#left + 1] = id
      else
        entries = entries + 1
      end
    end
  end
  local claims = call('HGETALL', 'cf:claim')
  for i = 1, #claims, 2 do
    if split(claims[i + 1]) == job and call('HEXISTS', 'cf:entry', claims[i + 1]) == 0 then
      left[#left + 1] = claims[i + 1]
      if repair == '1' then call('HDEL', 'cf:claim', claims[i]) end
    end
  end
  local counted = {of[1] + of[5], of[2], of[3], of[4], of[5], entries}
  local kept = call('HMGET', key, unpack(COUNTED))
  if repair == '1' then
    for _, id in ipairs(left) do leave_window(id) end
    for i, name in ipairs(COUNTED) do
      call('HSET', key, name, counted[i])
    end
  end
  return {counted, kept, left}
end

-- Create a live job with all its images: queue, message, row ... in the order of indexes, then its fields. Return 0, and
-- change nothing, if it exists.
function script.submit(job, lease, count, ...)
  local args = {...}
  if create(job, unpack(args, 1 + 3 * count)) == 0 then return 0 end
  call('HSET', 'cf:job:' .. job, 'listed', 1)
  enter_live(job, lease, 0, {unpack(args, 1, 3 * count)})
  return 1
end

-- Add images to a watch's live job, which is created if needed: digest, ETag seen before, ETag, queue, message, row ... in
-- the order of indexes from `total` on, then the job's fields. moved: another process appended first, nothing changed.
-- over: the job takes no more images.
function script.append(job, watch, lease, total, count, ...)
  local key, seen, args, rows = 'cf:job:' .. job, 'cf:watch:' .. watch, {...}, {}
  for _, flag in ipairs({'listed', 'cancelled_at', 'closed'}) do
    if call('HEXISTS', key, flag) == 1 then return 'over' end
  end
  if (call('HGET', key, 'total') or '0') ~= total then return 'moved' end
  for i = 1, 6 * count, 6 do
    if (call('HGET', seen .. ':seen', args[i]) or '') ~= args[i + 1] then return 'moved' end
  end
  create(job, unpack(args, 1 + 6 * count))
  for i = 1, 6 * count, 6 do
    call('HSET', seen .. ':seen', args[i], args[i + 2])
    call('ZADD', seen .. ':when', at(now), args[i])
    for j = 3, 5 do rows[#rows + 1] = args[i + j] end
  end
  extend_watch(watch)
  enter_live(job, lease, tonumber(total), rows)
  return 'ok'
end

-- Record a complete listing of a watch's prefix. Forget up to `limit` versions seen more than `keep` seconds before it;
-- return how many.
function script.swept(watch, began, keep, limit)
  local seen = 'cf:watch:' .. watch
  call('HSET', seen, 'swept', began)
  extend_watch(watch)
  local old = call('ZRANGEBYSCORE', seen .. ':when', '-inf', at(math.min(now, began) - keep), 'LIMIT', 0, limit)
  for _, digest in ipairs(old) do
    call('HDEL', seen .. ':seen', digest)
    call('ZREM', seen .. ':when', digest)
  end
  return #old
end

-- Claim an image and its output. Returns an outcome of `ClaimOutcome` (jobs/ledger/window.py); after go: failed attempts,
-- lost workers, seconds since its message was published, the last error, workers killed in isolation. isolated: 1 if the
-- worker does nothing else.
function script.claim(id, token, output, lease, isolated)
  local job, index = split(id)
  if not job or call('EXISTS', 'cf:job:' .. job) == 0 then return {'gone'} end
  if state_of(job, index) ~= STATE.open then
    leave_window(id)
    return {'final'}
  end
  if call('HEXISTS', 'cf:entry', id) == 0 then return {finish_if_cancelled(id) and 'cancelled' or 'gone'} end
  local lease_ends = call('ZSCORE', 'cf:leased', id)
  if lease_ends and not owns(id, token) then
    if tonumber(lease_ends) > now then return {'busy'} end
    count_lost_worker(id)
  end
  if finish_if_cancelled(id) then return {'cancelled'} end
  if call('ZSCORE', 'cf:retry', id) then return {'busy'} end
  if isolated ~= '1' and is_suspect(id) then
    requeue(id, lease)
    return {'suspect'}
  end
  local other = call('HGET', 'cf:claim', output)
  if other and other ~= id then
    if tonumber(call('ZSCORE', 'cf:leased', other) or 0) > now then
      call('ZREM', 'cf:waiting', id)
      call('ZADD', 'cf:retry', at(now + lease / 4), id)
      return {'taken'}
    end
  end
  call('HSET', 'cf:owner', id, token .. ' ' .. output)
  call('HSET', 'cf:claim', output, id)
  call('ZADD', 'cf:leased', at(now + lease), id)
  call('ZREM', 'cf:waiting', id)
  local published = call('HGET', 'cf:published', id)
  local tries, vanished = call('HGET', 'cf:tries', id) or 0, call('HGET', 'cf:vanished', id) or 0
  local blamed, died = call('HGET', 'cf:blamed', id) or '', call('HGET', 'cf:died', id) or 0
  return {'go', tonumber(tries), tonumber(vanished), published and at(now - published) or '', blamed, tonumber(died)}
end

-- Renew leases: id, token ... Return the ids whose lease is lost.
function script.renew(lease, ...)
  local args, lost = {...}, {}
  for i = 1, #args, 2 do
    if owns(args[i], args[i + 1]) then
      call('ZADD', 'cf:leased', 'XX', at(now + lease), args[i])
    else
      lost[#lost + 1] = args[i]
    end
  end
  return lost
end

-- Make an image final. ok: counted now. final: it was before. stale: this token does not hold it any more; nothing changed.
-- note: of a done image, or empty; then what it adds to the job's stats: name, count ...
function script.finish(id, token, state, failure, note, ...)
  local job, index = split(id)
  if not owns(id, token) then
    if call('EXISTS', 'cf:job:' .. job) == 1 and state_of(job, index) ~= STATE.open then return 'final' end
    return 'stale'
  end
  local counted = call('EXISTS', 'cf:job:' .. job) == 1 and make_final(job, index, tonumber(state))
  if counted and failure ~= '' then call('HSET', 'cf:job:' .. job .. ':failures', index, failure) end
  if counted then
    local key = 'cf:job:' .. job
    if note ~= '' and call('HLEN', key .. ':remarks') < MAX_REMARKS then
      call('HSET', key .. ':remarks', index, note)
    end
    local counts = {...}
    for i = 1, #counts, 2 do call('HINCRBY', key .. ':tally', counts[i], counts[i + 1]) end
    add_event(job, id, 'webhook_images')
  end
  leave_window(id)
  return counted and 'ok' or 'final'
end

-- Use up an attempt; schedule a retry.
function script.defer(id, token, pause)
  if not owns(id, token) then return 'stale' end
  drop_claim(id)
  if finish_if_cancelled(id) then return 'ok' end
  call('HINCRBY', 'cf:tries', id, 1)
  call('ZADD', 'cf:retry', at(now + pause), id)
  return 'ok'
end

-- Give an image back without using up an attempt: to the end of its queue.
function script.release(id, token, lease)
  if not owns(id, token) then return 'stale' end
  drop_claim(id)
  if not finish_if_cancelled(id) then requeue(id, lease) end
  return 'ok'
end

-- A worker ends with `error`, perhaps because of this image: as if its lease had expired, but at once.
function script.vanish(id, token, error, lease)
  if not owns(id, token) then return 'stale' end
  call('SREM', 'cf:computing', id)
  count_lost_worker(id)
  if finish_if_cancelled(id) then return 'ok' end
  call('HSET', 'cf:blamed', id, error)
  requeue(id, lease)
  return 'ok'
end

-- Mark that this image is computed in isolation (on: 1), or not: if the worker vanishes meanwhile, :died counts it.
function script.computing(id, token, on)
  if not owns(id, token) then return 'stale' end
  call(on == '1' and 'SADD' or 'SREM', 'cf:computing', id)
  return 'ok'
end

function script.heartbeat(node, ttl, ...)
  call('DEL', 'cf:worker:' .. node)
  call('HSET', 'cf:worker:' .. node, ...)
  call('EXPIRE', 'cf:worker:' .. node, ttl)
  call('ZADD', 'cf:workers', at(now), node)
  call('ZREMRANGEBYSCORE', 'cf:workers', '-inf', at(now - 86400))
end

function script.workers() return workers_alive() end

-- Return a job, its stats and the heartbeats in one round trip: each may wait behind other scripts.
function script.look(job)
  return {call('HGETALL', 'cf:job:' .. job), call('HGETALL', 'cf:job:' .. job .. ':tally'), workers_alive()}
end

-- Return the size of the window by place, then the length of each queue and the age of its oldest message, in seconds.
function script.survey(...)
  local found = {call('ZCARD', 'cf:waiting'), call('ZCARD', 'cf:leased'), call('ZCARD', 'cf:retry')}
  for _, queue in ipairs({...}) do
    local oldest = call('LINDEX', queue, -1)
    local id = oldest and string.match(oldest, '"correlation_id": ?"([^"]+)"')
    local published = id and call('HGET', 'cf:published', id)
    found[#found + 1] = call('LLEN', queue)
    found[#found + 1] = at(published and now - published or 0)
  end
  return found
end

-- Return receivers with due events, the one that waits longest first.
function script.receivers_due(limit) return call('ZRANGEBYSCORE', 'cf:outbox', '-inf', at(now), 'LIMIT', 0, limit) end

-- Lease a receiver's due events to the caller: event, failed deliveries, end of the lease ...
function script.take_events(receiver, limit, lease)
  local outbox, taken, ends = 'cf:outbox:' .. receiver, {}, at(now + lease)
  for _, event in ipairs(call('ZRANGEBYSCORE', outbox, '-inf', at(now), 'LIMIT', 0, limit)) do
    call('ZADD', outbox, ends, event)
    for _, fact in ipairs({event, call('HGET', 'cf:outbox:tries', event) or '0', ends}) do taken[#taken + 1] = fact end
  end
  schedule_receiver(receiver)
  return taken
end

-- Record the outcome of a delivery: sent, later (after `pause` seconds) or given_up. Changes nothing when the lease is lost
-- or the event happened again.
function script.delivered(receiver, event, ends, outcome, pause)
  local outbox = 'cf:outbox:' .. receiver
  if tonumber(call('ZSCORE', outbox, event) or 0) ~= tonumber(ends) then return 0 end
  if outcome == 'later' then
    call('ZADD', outbox, at(now + pause), event)
    call('HINCRBY', 'cf:outbox:tries', event, 1)
    schedule_receiver(receiver)
    return 1
  end
  call('DECRBY', 'cf:outbox:size', call('ZREM', outbox, event))
  call('HDEL', 'cf:outbox:tries', event)
  schedule_receiver(receiver)
  local key = 'cf:job:' .. (split(event) or event)
  if outcome == 'given_up' and call('EXISTS', key) == 1 then call('HINCRBY', key, 'undelivered', 1) end
  return 1
end

-- Return an image's state, how often it was reopened, and its failure or ''.
function script.outcome(job, index)
  local key = 'cf:job:' .. job
  local reopened = call('BITFIELD', key .. ':reopened', 'GET', 'u8', '#' .. index)[1]
  return {state_of(job, index), reopened, call('HGET', key .. ':failures', index) or ''}
end

-- Make the events of final images in [from, to) due again, up to the outbox's limit. Return how many, and the index to
-- continue from.
function script.retell(job, from, to)
  if call('HEXISTS', 'cf:job:' .. job, 'webhook_images') == 0 then return {0, tonumber(to)} end
  local receiver, count = receiver_of(job), 0
  for index = from, to - 1 do
    local number = string.format('%d', index)
    if state_of(job, number) ~= STATE.open then
      if not make_due(receiver, job .. ':' .. number) then return {count, index} end
      count = count + 1
    end
  end
  return {count, tonumber(to)}
end

-- Make the event of a closed job due again; reset its count of undelivered events.
function script.retell_job(job)
  local key = 'cf:job:' .. job
  call('HDEL', key, 'undelivered')
  if call('HEXISTS', key, 'closed') == 0 then return 0 end
  add_event(job, job, 'webhook')
  return 1
end

-- Become or stay the active dispatcher. Return the fencing token, or false while another one is active.
function script.lead(me, ttl_ms)
  local active = call('GET', 'cf:dispatcher')
  if active and active ~= me then return false end
  call('SET', 'cf:dispatcher', me, 'PX', ttl_ms)
  if not active then call('INCR', 'cf:dispatcher:epoch') end
  return call('GET', 'cf:dispatcher:epoch')
end

function script.resign(me)
  if call('GET', 'cf:dispatcher') == me then call('DEL', 'cf:dispatcher') end
end

-- Check the fencing token only.
function fenced.still() return 1 end

-- Pause a job, as the active dispatcher.
function fenced.hold(job, reason)
  if call('EXISTS', 'cf:job:' .. job) == 1 then call('HSET', 'cf:job:' .. job, 'paused', reason) end
end

-- Move the cursor over final images. Return false when it was elsewhere.
function fenced.pass_over(job, cursor, to)
  local key = 'cf:job:' .. job
  if call('HGET', key, 'cursor') ~= cursor then return false end
  call('HSET', key, 'cursor', to)
  return true
end

-- Write a key, which a full Redis refuses.
function fenced.room()
  call('SET', 'cf:room', '')
end

-- Queue the next images of a job; window and cursor script together. Rows: queue, message ... from `cursor` on; without a
-- queue the image fails, and the message is its failure; final images are skipped. Return how many were queued, or false
-- when the cursor was elsewhere or the job is paused or cancelled.
function fenced.feed(job, cursor, lease, ...)
  local key, args = 'cf:job:' .. job, {...}
  if call('HGET', key, 'cursor') ~= cursor then return false end
  if call('HEXISTS', key, 'cancelled_at') == 1 or call('HEXISTS', key, 'paused') == 1 then return false end
  local index, entered = tonumber(cursor), 0
  for i = 1, #args, 2 do
    if state_of(job, index) == STATE.open then
      local number = string.format('%d', index)
      if args[i] ~= '' then
        enter(job .. ':' .. number, args[i], args[i + 1], lease)
        entered = entered + 1
      else
        make_final(job, number, STATE.failed)
        call('HSET', key .. ':failures', number, args[i + 1])
        add_event(job, job .. ':' .. number, 'webhook_images')
      end
    end
    index = index + 1
  end
  call('HSET', key, 'cursor', string.format('%d', index))
  return entered
end

-- Count a part of a live job's manifest that is in S3, and drop its rows. Return 0 when another part was expected.
function fenced.record(job, part, count, first, last)
  local key = 'cf:job:' .. job
  if call('HGET', key, 'parts') ~= part then return 0 end
  call('HSET', key .. ':parts', part, cjson.encode({first, last, tonumber(count)}))
  call('HINCRBY', key, 'parts', 1)
  call('HINCRBY', key, 'unrecorded', -count)
  call('LTRIM', key .. ':rows', count, -1)
  return 1
end

-- Requeue images whose retry is due.
function fenced.retry_due(lease, limit)
  local due = call('ZRANGEBYSCORE', 'cf:retry', '-inf', at(now), 'LIMIT', 0, limit)
  for _, id in ipairs(due) do
    call('ZREM', 'cf:retry', id)
    if not finish_if_cancelled(id) and call('HEXISTS', 'cf:entry', id) == 1 then requeue(id, lease) end
  end
  return #due
end

-- Requeue images whose lease has expired; the second time on the suspect queue.
function fenced.reclaim(lease, limit)
  local ended = call('ZRANGEBYSCORE', 'cf:leased', '-inf', at(now), 'LIMIT', 0, limit)
  for _, id in ipairs(ended) do
    count_lost_worker(id)
    if not finish_if_cancelled(id) and call('HEXISTS', 'cf:entry', id) == 1 then requeue(id, lease) end
  end
  return ended
end

function fenced.overdue(limit)
  return call('ZRANGEBYSCORE', 'cf:waiting', '-inf', at(now), 'LIMIT', 0, limit)
end

-- Extend the deadline of overdue images that have a message; publish the others again. id, 1 (has one) or 0 ...
function fenced.look_again(lease, ...)
  local args, published = {...}, 0
  for i = 1, #args, 2 do
    local id = args[i]
    local due = call('ZSCORE', 'cf:waiting', id)
    if due and tonumber(due) <= now and not finish_if_cancelled(id) then
      if args[i + 1] == '1' then
        call('ZADD', 'cf:waiting', at(now + lease), id)
      else
        requeue(id, lease)
        published = published + 1
      end
    end
  end
  return published
end

-- Make a cancelled job's images in the window final, except leased ones, in about `count` entries from `scan` on. Return the
-- next cursor ('0': finished), and the indexes of leased images.
function fenced.cancel_fed(job, scan, count)
  local found = call('HSCAN', 'cf:entry', scan, 'COUNT', count)
  local answer = {found[1]}
  for i = 1, #found[2], 2 do
    local id = found[2][i]
    local owner, index = split(id)
    if owner == job then
      if call('ZSCORE', 'cf:leased', id) then answer[#answer + 1] = index else finish_if_cancelled(id) end
    end
  end
  return answer
end

-- Make the next `count` (even) images of a cancelled job final, except those in `left` (indexes, separated by spaces). Two
-- per byte: ten million would take minutes one by one. Return the new cursor, or false when it was elsewhere.
function fenced.cancel_rest(job, cursor, count, left)
  local key = 'cf:job:' .. job
  if call('HGET', key, 'cancel_cursor') ~= cursor then return false end
  local from, total, held = tonumber(cursor), tonumber(call('HGET', key, 'total')), {}
  for index in string.gmatch(left, '%d+') do
    if state_of(job, index) == STATE.open then held[#held + 1] = index end
  end
  local to, changed = math.min(from + count, total), 0
  local function cancel_both(bytes)
    changed = changed + 2 * #bytes
    return string.rep('\68', #bytes)
  end
  local function cancel_one(byte)
    changed = changed + 1
    return string.char(string.byte(byte) + (string.byte(byte) < 16 and 64 or 4))
  end
  local start, bytes = from / 2, math.floor((to - from) / 2)
  local states = call('GETRANGE', key .. ':bits', start, start + bytes - 1)
  states = bytes == 0 and '' or states .. string.rep('\0', bytes - #states)
  states = string.gsub(string.gsub(states, '%z+', cancel_both), '[\1-\15\16\32\48\64\80]', cancel_one)
  call('SETRANGE', key .. ':bits', start, states)
  if to % 2 == 1 then make_final(job, to - 1, STATE.cancelled) end
  for _, index in ipairs(held) do
    call('BITFIELD', key .. ':bits', 'SET', 'u4', '#' .. index, STATE.open)
    changed = changed - 1
  end
  call('HINCRBY', key, 'cancelled', changed)
  call('HSET', key, 'cancel_cursor', string.format('%d', to))
  return to
end

-- Queue reopened images: index, queue, message ... Return how many.
function fenced.feed_again(job, lease, ...)
  local key, args, fed = 'cf:job:' .. job, {...}, 0
  if call('HEXISTS', key, 'cancelled_at') == 1 or call('HEXISTS', key, 'paused') == 1 then return 0 end
  for i = 1, #args, 3 do
    if call('SETBIT', key .. ':again', args[i], 0) == 1 then
      call('HINCRBY', key, 'reopened', -1)
      enter(job .. ':' .. args[i], args[i + 1], args[i + 2], lease)
      fed = fed + 1
    end
  end
  return fed
end

-- Drop failures that are in S3 as part `number`: index, time of the failure ... Keeps those that changed meanwhile.
function fenced.spilled(job, number, ...)
  local key, args = 'cf:job:' .. job, {...}
  if (call('HGET', key, 'spills') or '0') ~= number then return 0 end
  for i = 1, #args, 2 do
    local failure = call('HGET', key .. ':failures', args[i])
    if failure and string.find(failure, '"at": ' .. args[i + 1], 1, true) then
      call('HDEL', key .. ':failures', args[i])
    end
  end
  return call('HINCRBY', key, 'spills', 1)
end

-- Close a job whose images are all final; it expires after `keep` seconds. Also prune expired jobs from the list, in a random
-- sample: the oldest may stay for ever.
function fenced.close(job, keep)
  local key = 'cf:job:' .. job
  if call('HEXISTS', key, 'closed') == 1 then return 0 end
  local sum = 0
  for _, name in ipairs({'done', 'failed', 'skipped', 'cancelled'}) do
    sum = sum + tonumber(call('HGET', key, name) or 0)
  end
  if call('HEXISTS', key, 'listed') == 0 or sum ~= tonumber(call('HGET', key, 'total')) then return 0 end
  call('HSET', key, 'closed', at(now))
  call('SREM', 'cf:open', job)
  add_event(job, job, 'webhook')
  for _, suffix in ipairs(KEYS_OF_JOB) do call('EXPIRE', key .. suffix, keep) end
  for _, old in ipairs(call('ZRANDMEMBER', 'cf:jobs', PRUNED)) do
    if call('EXISTS', 'cf:job:' .. old) == 0 then call('ZREM', 'cf:jobs', old) end
  end
  return 1
end
