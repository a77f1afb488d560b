"""The pure core: plans, topologies, schedules, programs and costs. No torch, no files, no sockets, no clock."""
