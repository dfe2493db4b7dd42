//! `PATH,key=value,flag` on the command line.
//!
//! A comma in a path is written twice, as in QEMU: `my,,disk.img`.

use std::path::PathBuf;
use std::str::FromStr;

use super::{
    Backing, CacheMode, ConfigError, DiskConfig, DiskFormat, Forward, ForwardedProtocol, Image, IoEngine,
    MAX_DISK_QUEUES, MAX_NET_QUEUES, MAX_USER_MTU, NetBackend, NetConfig, RateLimits, SerialConfig, TapNetwork,
    TokenBucket, Transport, UserNetwork,
};

/// The parts of an option text, each at most once but for a disk's backing files and a network's forwards.
pub(super) struct Parts {
    /// Text before the first comma, and the `key[=value]` parts after it.
    pub first: String,
    pub rest: Vec<(String, Option<String>)>,
}

const REPEATED: [&str; 3] = ["backing", "backing-format", "forward"];

impl Parts {
    pub fn split(text: &str) -> Result<Self, ConfigError> {
        let mut parts = vec![String::new()];
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            if c == ',' && chars.next_if_eq(&',').is_none() {
                parts.push(String::new());
            } else {
                parts.last_mut().expect("never empty").push(c);
            }
        }
        let mut parts = parts.into_iter();
        let first = parts.next().unwrap_or_default();
        let mut rest: Vec<(String, Option<String>)> = Vec::new();
        for part in parts {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (part, None),
            };
            if !REPEATED.contains(&&*key) && rest.iter().any(|(k, _)| *k == key) {
                return Err(ConfigError::RepeatedOption(key));
            }
            rest.push((key, value));
        }
        Ok(Self { first, rest })
    }
}

/// A flag: `ro`, `ro=on`, `ro=off`.
pub(super) fn flag(key: &'static str, value: Option<&str>) -> Result<bool, ConfigError> {
    match value {
        None | Some("on") => Ok(true),
        Some("off") => Ok(false),
        Some(other) => Err(ConfigError::OptionValue { key, value: other.into(), takes: "on or off" }),
    }
}

const DISK_OPTIONS: &str = "format, backing, backing-format, ro, id, cache, queues, engine, bandwidth and ops";

impl DiskConfig {
    /// `PATH[,format=raw|qcow2[,backing=PATH[,backing-format=raw|qcow2]]...][,ro][,id=NAME][,cache=writeback|unsafe]
    /// [,queues=N][,engine=sync|io_uring|auto][,bandwidth=BYTES[/MS][+BURST]][,ops=N[/MS][+BURST]]`
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn from_arg(text: &str) -> Result<Self, ConfigError> {
        let Parts { first, rest } = Parts::split(text)?;
        if first.is_empty() {
            return Err(ConfigError::NoPath);
        }
        let mut disk = Self {
            path: first.into(),
            read_only: false,
            id: None,
            cache: CacheMode::default(),
            engine: IoEngine::default(),
            queues: 1,
            root: false,
            image: Image::default(),
            limits: RateLimits::default(),
        };
        for (key, value) in rest {
            match (key.as_str(), value) {
                ("ro", value) => disk.read_only = flag("ro", value.as_deref())?,
                ("id", value) => disk.id = Some(disk_id(value.unwrap_or_default())?),
                ("cache", value) => {
                    disk.cache = match value.as_deref() {
                        Some("writeback") => CacheMode::Writeback,
                        Some("unsafe") => CacheMode::Unsafe,
                        other => {
                            let value = other.unwrap_or_default().into();
                            return Err(ConfigError::OptionValue { key: "cache", value, takes: "writeback or unsafe" });
                        }
                    }
                }
                ("engine", value) => disk.engine = value.unwrap_or_default().parse()?,
                ("queues", value) => disk.queues = disk_queues(value.unwrap_or_default())?,
                ("bandwidth", value) => disk.limits.bandwidth = Some(bandwidth("bandwidth", value)?),
                ("ops", value) => disk.limits.operations = Some(operations("ops", value)?),
                (key, value) if disk.image.set(key, value.as_deref())? => {}
                _ => return Err(ConfigError::UnknownOption { key, known: DISK_OPTIONS }),
            }
        }
        if !disk.image.backing.is_empty() && disk.image.format != Some(DiskFormat::Qcow2) {
            return Err(ConfigError::BackingOfRaw);
        }
        Ok(disk)
    }
}

impl FromStr for DiskConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        Self::from_arg(text)
    }
}

fn disk_id(id: String) -> Result<String, ConfigError> {
    let fits = (1..=20).contains(&id.len());
    if fits && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b)) {
        Ok(id)
    } else {
        Err(ConfigError::DiskId(id))
    }
}

impl Image {
    /// Takes an option if it is about the image; returns whether it is.
    fn set(&mut self, key: &str, value: Option<&str>) -> Result<bool, ConfigError> {
        let value = value.unwrap_or_default();
        match key {
            "format" => self.format = Some(value.parse()?),
            "backing" if value.is_empty() => return Err(ConfigError::NoPath),
            "backing" => self.backing.push(Backing { path: value.into(), format: None }),
            "backing-format" => {
                let last = self.backing.last_mut().filter(|backing| backing.format.is_none());
                last.ok_or(ConfigError::BackingFormat)?.format = Some(value.parse()?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl FromStr for Backing {
    type Err = ConfigError;

    /// `PATH[,format=raw|qcow2]`
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let Parts { first, rest } = Parts::split(text)?;
        if first.is_empty() {
            return Err(ConfigError::NoPath);
        }
        let mut backing = Self { path: first.into(), format: None };
        for (key, value) in rest {
            match key.as_str() {
                "format" => backing.format = Some(value.unwrap_or_default().parse()?),
                _ => return Err(ConfigError::UnknownOption { key, known: "format" }),
            }
        }
        Ok(backing)
    }
}

impl FromStr for DiskFormat {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(ConfigError::OptionValue { key: "format", value: text.into(), takes: "raw or qcow2" }),
        }
    }
}

impl FromStr for IoEngine {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "auto" => Ok(Self::Auto),
            "sync" => Ok(Self::Sync),
            "io_uring" => Ok(Self::IoUring),
            _ => Err(ConfigError::OptionValue { key: "engine", value: text.into(), takes: "sync, io_uring or auto" }),
        }
    }
}

fn disk_queues(value: String) -> Result<u16, ConfigError> {
    let queues = value.parse().ok().filter(|n| (1..=MAX_DISK_QUEUES).contains(n));
    queues.ok_or(ConfigError::OptionValue { key: "queues", value, takes: "1 to 16" })
}

fn bandwidth(key: &'static str, value: Option<String>) -> Result<TokenBucket, ConfigError> {
    TokenBucket::of_bytes(key, &value.unwrap_or_default())
}

fn operations(key: &'static str, value: Option<String>) -> Result<TokenBucket, ConfigError> {
    TokenBucket::of_operations(key, &value.unwrap_or_default())
}

const NET_OPTIONS: &str = "tap, queues and vhost, or user, forward and host, with mac, mtu and {rx,tx}-{bandwidth,ops}";

impl FromStr for NetConfig {
    type Err = ConfigError;

    /// `tap=NAME[,queues=N][,vhost=on|off]` or `user[,forward=tcp|udp:HOSTPORT:GUESTPORT]...[,host=on|off]`, with
    /// `[,mac=ADDRESS][,mtu=BYTES][,rx-bandwidth=BYTES[/MS][+BURST]][,rx-ops=N[/MS][+BURST]]` and `tx-` likewise, in any
    /// order
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        // All parts are keyed, so the first one is like the others.
        let Parts { rest, .. } = Parts::split(&format!(",{text}"))?;
        let (mut name, mut queues, mut vhost) = (None, None, None);
        let (mut user, mut host, mut forwards) = (false, None, Vec::new());
        let (mut mac, mut mtu) = (None, None);
        let (mut rx_limits, mut tx_limits) = (RateLimits::default(), RateLimits::default());
        for (key, value) in rest {
            match (key.as_str(), value) {
                ("vhost", value) => vhost = Some(flag("vhost", value.as_deref())?),
                ("host", value) => host = Some(flag("host", value.as_deref())?),
                ("user", value) => user = flag("user", value.as_deref())?,
                ("forward", value) => forwards.push(value.unwrap_or_default().parse()?),
                ("tap", value) => name = value.filter(|name| !name.is_empty()),
                ("mac", value) => mac = Some(value.unwrap_or_default().parse()?),
                ("mtu", value) => {
                    let value = value.unwrap_or_default();
                    let bytes = value.parse().ok().filter(|&m: &u16| m >= 68);
                    mtu = Some(bytes.ok_or(ConfigError::Mtu(value))?);
                }
                ("queues", value) => {
                    let value = value.unwrap_or_default();
                    let count = value.parse().ok().filter(|n| (1..=MAX_NET_QUEUES).contains(n));
                    queues = Some(count.ok_or(ConfigError::OptionValue { key: "queues", value, takes: "1 to 16" })?);
                }
                ("rx-bandwidth", value) => rx_limits.bandwidth = Some(bandwidth("rx-bandwidth", value)?),
                ("tx-bandwidth", value) => tx_limits.bandwidth = Some(bandwidth("tx-bandwidth", value)?),
                ("rx-ops", value) => rx_limits.operations = Some(operations("rx-ops", value)?),
                ("tx-ops", value) => tx_limits.operations = Some(operations("tx-ops", value)?),
                _ => return Err(ConfigError::UnknownOption { key, known: NET_OPTIONS }),
            }
        }
        let of_user = (host.map(|_| "host")).or((!forwards.is_empty()).then_some("forward"));
        let of_tap = queues.map(|_| "queues").or(vhost.map(|_| "vhost"));
        let backend = match (name, user) {
            (None, false) => return Err(ConfigError::NoNetBackend),
            (Some(_), true) => return Err(ConfigError::TwoNetBackends),
            (Some(name), false) => {
                let tap = TapNetwork { name, queues: queues.unwrap_or(1), vhost: vhost.unwrap_or(false) };
                other_backend(of_user, "a user network")?;
                NetBackend::Tap(tap)
            }
            (None, true) => {
                other_backend(of_tap, "a tap")?;
                if let Some(mtu) = mtu.filter(|&mtu| mtu > MAX_USER_MTU) {
                    let (value, takes) = (mtu.to_string(), "68 to 65520 in a user network");
                    return Err(ConfigError::OptionValue { key: "mtu", value, takes });
                }
                NetBackend::User(UserNetwork { forwards, host: host.unwrap_or(false) })
            }
        };
        Ok(Self { backend, mac, mtu, rx_limits, tx_limits })
    }
}

fn other_backend(key: Option<&'static str>, backend: &'static str) -> Result<(), ConfigError> {
    key.map_or(Ok(()), |key| Err(ConfigError::OptionOfOther { key, backend }))
}

impl FromStr for Forward {
    type Err = ConfigError;

    /// `tcp:HOSTPORT:GUESTPORT` or `udp:HOSTPORT:GUESTPORT`
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let port = |text: &str| text.parse().ok().filter(|&port: &u16| port != 0);
        let parse = || {
            let (protocol, ports) = text.split_once(':')?;
            let (host, guest) = ports.split_once(':')?;
            let protocol = match protocol {
                "tcp" => ForwardedProtocol::Tcp,
                "udp" => ForwardedProtocol::Udp,
                _ => return None,
            };
            Some(Self { protocol, host_port: port(host)?, guest_port: port(guest)? })
        };
        parse().ok_or_else(|| ConfigError::Forward(text.into()))
    }
}

impl FromStr for Transport {
    type Err = ConfigError;

    /// `pci` or `mmio[,pci]`
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let Parts { first, rest } = Parts::split(text)?;
        let mut transport = match first.as_str() {
            "pci" => Self::Pci,
            "mmio" => Self::Mmio { pci: false },
            _ => return Err(ConfigError::OptionValue { key: "transport", value: first, takes: "pci or mmio" }),
        };
        for (key, value) in rest {
            match (key.as_str(), &mut transport) {
                ("pci", Self::Mmio { pci }) => *pci = flag("pci", value.as_deref())?,
                (_, Self::Pci) => return Err(ConfigError::UnknownOption { key, known: "none" }),
                (_, Self::Mmio { .. }) => return Err(ConfigError::UnknownOption { key, known: "pci" }),
            }
        }
        Ok(transport)
    }
}

impl FromStr for SerialConfig {
    type Err = ConfigError;

    /// `stdio`, `null`, `file=PATH` or `socket=PATH`
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let path = |path: &str| if path.is_empty() { Err(ConfigError::NoPath) } else { Ok(PathBuf::from(path)) };
        match text.split_once('=') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "null" => Ok(Self::Null),
            Some(("file", value)) => path(value).map(Self::File),
            Some(("socket", value)) => path(value).map(Self::Socket),
            _ => Err(ConfigError::OptionValue {
                key: "serial",
                value: text.into(),
                takes: "stdio, null, file=PATH or socket=PATH",
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn disks() {
        let disk: DiskConfig = "a b.img,ro,id=data-1,cache=unsafe,queues=4,engine=io_uring".parse().unwrap();
        let expected = DiskConfig {
            path: "a b.img".into(),
            read_only: true,
            id: Some("data-1".into()),
            cache: CacheMode::Unsafe,
            engine: IoEngine::IoUring,
            queues: 4,
            root: false,
            image: Image::default(),
            limits: RateLimits::default(),
        };
        assert_eq!(disk, expected);
        assert_eq!("my,,disk,ro=off".parse::<DiskConfig>().unwrap().path, PathBuf::from("my,disk"));
        for (text, error) in [
            ("", ConfigError::NoPath),
            (",ro", ConfigError::NoPath),
            ("a,ro,ro", ConfigError::RepeatedOption("ro".into())),
            ("a,id=", ConfigError::DiskId(String::new())),
            ("a,id=123456789012345678901", ConfigError::DiskId("123456789012345678901".into())),
            ("a,size=1", ConfigError::UnknownOption { key: "size".into(), known: DISK_OPTIONS }),
            ("a,ro=maybe", ConfigError::OptionValue { key: "ro", value: "maybe".into(), takes: "on or off" }),
        ] {
            assert_eq!(text.parse::<DiskConfig>(), Err(error), "{text}");
        }
        assert!("a,engine=aio".parse::<DiskConfig>().is_err());
        for (queues, ok) in [("1", true), ("16", true), ("17", false), ("0", false), ("-1", false), ("", false)] {
            assert_eq!(format!("a,queues={queues}").parse::<DiskConfig>().is_ok(), ok, "{queues} queues");
        }
    }

    #[test]
    fn images() {
        let image = |text: &str| text.parse::<DiskConfig>().map(|disk| disk.image);
        assert_eq!(image("a,format=raw"), Ok(Image { format: Some(DiskFormat::Raw), backing: Vec::new() }));
        let backing = |path: &str, format| Backing { path: path.into(), format };
        assert_eq!(
            image("a,format=qcow2,backing=b,,1,backing-format=qcow2,backing=c"),
            Ok(Image {
                format: Some(DiskFormat::Qcow2),
                backing: vec![backing("b,1", Some(DiskFormat::Qcow2)), backing("c", None)]
            })
        );
        for (text, error) in [
            ("a,format=qcow2,backing", ConfigError::NoPath),
            ("a,format=qcow2,backing-format=raw", ConfigError::BackingFormat),
            ("a,format=qcow2,backing=b,backing-format=raw,backing-format=raw", ConfigError::BackingFormat),
            ("a,backing=b", ConfigError::BackingOfRaw),
            ("a,format=raw,backing=b", ConfigError::BackingOfRaw),
            ("a,format=raw,format=raw", ConfigError::RepeatedOption("format".into())),
        ] {
            assert_eq!(image(text), Err(error), "{text}");
        }
        assert_eq!("b,,1,format=raw".parse(), Ok(backing("b,1", Some(DiskFormat::Raw))));
        for text in ["", ",format=raw", "b,ro", "b,format", "b,format=raw,format=raw"] {
            assert!(text.parse::<Backing>().is_err(), "{text}");
        }
        for text in ["a,format", "a,format=vmdk", "a,format=qcow2,backing=b,backing-format=vhd"] {
            assert!(matches!(image(text), Err(ConfigError::OptionValue { .. })), "{text}");
        }
    }

    #[test]
    fn nics() {
        let nic: NetConfig = "mtu=9000,tap=t0,mac=02:00:00:00:00:01".parse().unwrap();
        let tap = |queues, vhost| NetBackend::Tap(TapNetwork { name: "t0".into(), queues, vhost });
        assert_eq!(nic.backend, tap(1, false));
        assert_eq!(nic.mtu, Some(9000));
        assert_eq!(nic.mac.unwrap().to_string(), "02:00:00:00:00:01");
        assert_eq!("tap=t0,queues=16,vhost=on".parse::<NetConfig>().unwrap().backend, tap(16, true));
        for (text, ok) in [("vhost", true), ("vhost=off", true), ("vhost=", false), ("queues=0", false)] {
            assert_eq!(format!("tap=t,{text}").parse::<NetConfig>().is_ok(), ok, "{text}");
        }
        for text in ["queues=17", "queues", "queues=-1", "vhost=on,vhost=on"] {
            assert!(format!("tap=t,{text}").parse::<NetConfig>().is_err(), "{text}");
        }
        for mtu in ["67", "65536", "x", ""] {
            assert_eq!(format!("tap=t,mtu={mtu}").parse::<NetConfig>(), Err(ConfigError::Mtu(mtu.into())));
        }
        for text in ["tap=", "mtu=1500", "forward=tcp:1:1", ""] {
            let error = text.parse::<NetConfig>().unwrap_err();
            assert!(matches!(error, ConfigError::NoNetBackend | ConfigError::UnknownOption { .. }), "{text}: {error}");
        }
    }

    #[test]
    fn user_networks() {
        let nic: NetConfig = "user,forward=tcp:8080:80,mtu=1500,forward=udp:1:65535,host=on".parse().unwrap();
        let forward = |protocol, host_port, guest_port| Forward { protocol, host_port, guest_port };
        let forwards = vec![forward(ForwardedProtocol::Tcp, 8080, 80), forward(ForwardedProtocol::Udp, 1, 65535)];
        assert_eq!(nic.backend, NetBackend::User(UserNetwork { forwards, host: true }));
        assert_eq!("user".parse::<NetConfig>().unwrap().backend, NetBackend::User(UserNetwork::default()));
        for text in ["", "tcp", "tcp:80", "tcp:0:80", "tcp:80:0", "tcp:65536:1", "sctp:1:1", "tcp:1:1:1", "tcp:a:b"] {
            let error = format!("user,forward={text}").parse::<NetConfig>().unwrap_err();
            assert_eq!(error, ConfigError::Forward(text.into()));
        }
        let other = |key, backend| Err(ConfigError::OptionOfOther { key, backend });
        assert_eq!("user,queues=2".parse::<NetConfig>(), other("queues", "a tap"));
        assert_eq!("user,vhost=off".parse::<NetConfig>(), other("vhost", "a tap"));
        assert_eq!("tap=t,host=on".parse::<NetConfig>(), other("host", "a user network"));
        assert_eq!("tap=t,forward=tcp:1:1".parse::<NetConfig>(), other("forward", "a user network"));
        assert_eq!("tap=t,user".parse::<NetConfig>(), Err(ConfigError::TwoNetBackends));
        assert!(matches!("user,mtu=65521".parse::<NetConfig>(), Err(ConfigError::OptionValue { key: "mtu", .. })));
    }

    #[test]
    fn limits() {
        let bucket = |size, refill_ms, burst| Some(TokenBucket { size, refill_ms, burst });
        let limits = |bandwidth, operations| RateLimits { bandwidth, operations };
        let disk = |text: &str| text.parse::<DiskConfig>().map(|disk| disk.limits);
        assert_eq!(disk("a,bandwidth=1M,ops=9/10+8"), Ok(limits(bucket(1 << 20, 1000, 0), bucket(9, 10, 8))));
        let nic: NetConfig = "tx-ops=1,rx-bandwidth=2K,tap=t,tx-bandwidth=3K,rx-ops=4".parse().unwrap();
        assert_eq!(nic.rx_limits, limits(bucket(2048, 1000, 0), bucket(4, 1000, 0)));
        assert_eq!(nic.tx_limits, limits(bucket(3072, 1000, 0), bucket(1, 1000, 0)));
        for text in ["a,ops", "a,ops=", "a,bandwidth=0", "a,ops=1,ops=1", "a,rx-ops=1"] {
            assert!(disk(text).is_err(), "{text}");
        }
        for text in ["ops=1", "rx-ops", "tx-ops=1M", "rx-bandwidth=x", "tx-bandwidth=0"] {
            assert!(format!("user,{text}").parse::<NetConfig>().is_err(), "{text}");
        }
    }

    #[test]
    fn serials() {
        assert_eq!("stdio".parse(), Ok(SerialConfig::Stdio));
        assert_eq!("file=/a=b,c".parse(), Ok(SerialConfig::File("/a=b,c".into())));
        for text in ["", "tty", "file", "null=x", "pipe=x"] {
            assert!(text.parse::<SerialConfig>().is_err(), "{text}");
        }
        assert_eq!("file=".parse::<SerialConfig>(), Err(ConfigError::NoPath));
    }

    #[test]
    fn transports() {
        for (text, transport) in [
            ("pci", Transport::Pci),
            ("mmio", Transport::Mmio { pci: false }),
            ("mmio,pci", Transport::Mmio { pci: true }),
            ("mmio,pci=off", Transport::Mmio { pci: false }),
        ] {
            assert_eq!(text.parse(), Ok(transport));
        }
        for text in ["", "pcie", "pci,pci", "pci,pci=on", "mmio,irq=5", "mmio,pci=maybe", "mmio,pci,pci"] {
            assert!(text.parse::<Transport>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text: String) {
            let _ = (text.parse::<DiskConfig>(), text.parse::<NetConfig>(), text.parse::<SerialConfig>());
            let _ = text.parse::<Transport>();
        }
    }
}
