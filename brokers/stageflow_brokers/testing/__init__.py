"""Tools for tests: the contract of the broker port, and a simulated disk.

========================  ============================================================
`contract`                all parts of the contract in one class
`harness`                 a hub to connect to, and a peer that records what it receives
`contract_delivery`       publishing, order, credit, priority, release
`contract_settlement`     leases, transitions, retries, dead letters, checkpoints
`contract_groups`         idempotent starts, ends, watches, epochs
`contract_gathers`        joins, signals, deadlines
`contract_restarts`       cancellation, halts, restarts
`contract_recall`         what has not begun is shared again: priority, pause, idle consumers
`contract_supervision`    deaths, suspended delivery, recall and retire
`contract_admin`          pause, purge, peek, stats, facts, limits
`simulated_disk`          a disk in memory that fails, tears writes and loses unsynced data
========================  ============================================================
"""
