//! What the kernel's command line says about the root file system.

/// How the root's device is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    /// Below /dev.
    Device(String),
    Uuid(String),
    Label(String),
    PartUuid(String),
    PartLabel(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    pub root: Option<String>,
    /// `rootfstype=`; told by the superblock when absent.
    pub kind: Option<String>,
    /// `rootflags=`: what mount(2) takes as data.
    pub flags: String,
    pub writable: bool,
    /// `init=`
    pub init: Option<String>,
    /// `rootdelay=`: seconds to wait for the device, besides the usual ones.
    pub delay: u64,
    /// `rootwait`: wait for ever.
    pub wait: bool,
}

impl Options {
    /// The last word on anything is the one that counts, as for the kernel itself.
    #[must_use]
    pub fn parse(line: &str) -> Self {
        let mut options = Self::default();
        for word in words(line) {
            let (key, value) = word.split_once('=').unwrap_or((&word, ""));
            match key {
                "root" => options.root = Some(value.to_owned()),
                "rootfstype" => options.kind = Some(value.to_owned()),
                "rootflags" => options.flags = value.to_owned(),
                "ro" => options.writable = false,
                "rw" => options.writable = true,
                "init" => options.init = Some(value.to_owned()),
                "rootdelay" => options.delay = value.parse().unwrap_or(0),
                "rootwait" => options.wait = true,
                // What follows is the init's.
                "--" => break,
                _ => {}
            }
        }
        options
    }
}

/// Splits at white space that is not within double quotes, which go away.
fn words(line: &str) -> impl Iterator<Item = String> {
    let mut quoted = false;
    let mut words = vec![String::new()];
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            c if c.is_ascii_whitespace() && !quoted => words.push(String::new()),
            c => words.last_mut().expect("never empty").push(c),
        }
    }
    words.into_iter().filter(|word| !word.is_empty())
}

impl Root {
    /// `None` for what is no device of this machine, such as `nfs`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let named = |prefix: &str, link: &str| {
            let rest = text.strip_prefix(prefix).or_else(|| text.strip_prefix(link))?;
            (!rest.is_empty()).then(|| rest.to_owned())
        };
        if let Some(label) = named("LABEL=", "/dev/disk/by-label/") {
            Some(Self::Label(label))
        } else if let Some(uuid) = named("UUID=", "/dev/disk/by-uuid/") {
            Some(Self::Uuid(uuid.to_ascii_lowercase()))
        } else if let Some(uuid) = named("PARTUUID=", "/dev/disk/by-partuuid/") {
            Some(Self::PartUuid(uuid.to_ascii_lowercase()))
        } else if let Some(label) = named("PARTLABEL=", "/dev/disk/by-partlabel/") {
            Some(Self::PartLabel(label))
        } else {
            let name = text.strip_prefix("/dev/")?;
            (!name.is_empty() && !name.contains('/')).then(|| Self::Device(name.to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_last_word_counts() {
        let line = "console=ttyS0 panic=1 root=/dev/vda rw quiet root=\"LABEL=a b\" ro rootdelay=3 -- rw init=/x\n";
        let options = Options::parse(line);
        assert_eq!(options.root.as_deref(), Some("LABEL=a b"));
        assert_eq!((options.writable, options.delay, options.init), (false, 3, None));
    }

    #[test]
    fn names_of_roots() {
        for (text, root) in [
            ("/dev/vda", Some(Root::Device("vda".into()))),
            ("LABEL=x", Some(Root::Label("x".into()))),
            ("UUID=AB", Some(Root::Uuid("ab".into()))),
            ("/dev/disk/by-uuid/ab", Some(Root::Uuid("ab".into()))),
            ("PARTUUID=ab-01", Some(Root::PartUuid("ab-01".into()))),
            ("PARTLABEL=r", Some(Root::PartLabel("r".into()))),
            ("/dev/nfs/x", None),
            ("nfs", None),
            ("/dev/", None),
            ("LABEL=", None),
            ("/dev/../etc", None),
        ] {
            assert_eq!(Root::parse(text), root, "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(line: String) {
            let options = Options::parse(&line);
            let _ = options.root.map(|root| Root::parse(&root));
        }
    }
}
