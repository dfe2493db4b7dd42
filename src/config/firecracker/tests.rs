use super::*;

#[test]
fn a_configuration_file_is_read_and_shown_again() {
    let text = r#"{
        "boot-source": {"kernel_image_path": "vmlinux", "boot_args": "console=ttyS0"},
        "drives": [{"drive_id": "rootfs", "is_root_device": true, "path_on_host": "r.ext4"}],
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 1024},
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0"}],
        "something-else": 1
    }"#;
    let description: VmDescription = serde_json::from_str(text).unwrap();
    let shown = serde_json::to_string(&description).unwrap();
    let keys = [
        "balloon",
        "drives",
        "boot-source",
        "cpu-config",
        "logger",
        "machine-config",
        "metrics",
        "mmds-config",
        "network-interfaces",
        "vsock",
        "entropy",
        "pmem",
        "memory-hotplug",
    ];
    let places: Vec<_> = keys.iter().map(|key| shown.find(&format!("\"{key}\":")).expect(key)).collect();
    assert!(places.is_sorted(), "{shown}");
    assert!(shown.contains(r#""balloon":null"#) && !shown.contains("cpu_template"), "{shown}");
    assert_eq!(serde_json::from_str::<VmDescription>(&shown).unwrap(), description);
}

#[test]
fn limits_are_patched_piece_by_piece() {
    let bucket = |size| Some(TokenBucket { size, one_time_burst: None, refill_time: 100 });
    let mut limiter = None;
    RateLimiter::update(&mut limiter, Some(RateLimiter { bandwidth: bucket(5), ops: None }));
    RateLimiter::update(&mut limiter, Some(RateLimiter { bandwidth: None, ops: bucket(7) }));
    assert_eq!(limiter, Some(RateLimiter { bandwidth: bucket(5), ops: bucket(7) }));
    RateLimiter::update(&mut limiter, None);
    RateLimiter::update(&mut limiter, Some(RateLimiter { bandwidth: bucket(0), ops: None }));
    assert_eq!(limiter, Some(RateLimiter { bandwidth: None, ops: bucket(7) }));
    RateLimiter::update(&mut limiter, Some(RateLimiter { bandwidth: None, ops: bucket(0) }));
    assert_eq!(limiter, None);
}

#[test]
fn a_put_resets_what_it_leaves_out_but_for_the_template() {
    let before = MachineConfig { smt: true, cpu_template: Some(CpuTemplate::None), ..Default::default() };
    let new = MachineConfig { vcpu_count: 2, ..Default::default() };
    let after = before.replaced_by(new);
    assert_eq!((after.vcpu_count, after.smt, after.cpu_template), (2, false, Some(CpuTemplate::None)));
}
