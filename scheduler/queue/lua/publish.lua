-- Says that a worker lives and what its pool serves. ARGV: worker, its entry, pool, its card.
redis.call('DEL', $worker .. ARGV[1])  -- always allowed, so that the script passes at maxmemory
redis.call('SET', $worker .. ARGV[1], ARGV[2], 'PX', $worker_ms)
redis.call('SET', $card .. ARGV[3], ARGV[4], 'PX', $card_ms)
redis.call('SADD', $fleet, ARGV[1])
redis.call('SADD', $pools, ARGV[3])
