//! Looks at the files that a configuration names.
//!
//! A secret that others can read is refused, as ssh does: always when everybody can, and when a group can and the file
//! is ours to change (Kubernetes mounts secrets as root with the pod's group, which a pod cannot change).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use farshore_api::Identity;
use farshore_api::tls::{Reloading, TlsFiles};

use super::Config;
use super::problem::{Problem, Severity};
use super::reader::{FileKind, FileRef};
use super::secret;

const GROUP: u32 = 0o070;
const OTHERS: u32 = 0o007;
/// Larger files are not what they are taken for.
const MAX_BYTES: u64 = 4 << 20;

/// What is wrong with each of `files`.
pub(super) fn check(files: &[FileRef]) -> Vec<Problem> {
    files
        .iter()
        .filter_map(|file| {
            let (what, mend) = fault(&file.path, file.kind)?;
            Some(Problem { severity: Severity::Error, key: file.key.clone(), line: file.line, what, mend })
        })
        .collect()
}

impl Config {
    /// The agent's certificate material, which must be this site's.
    ///
    /// # Errors
    /// A file holds something else, or they do not fit together; the text names it.
    pub fn open_tls(&self) -> Result<Reloading, String> {
        let files = TlsFiles {
            certificate: self.tls.certificate_file.clone(),
            key: self.tls.key_file.clone(),
            ca: self.tls.ca_file.clone(),
        };
        let tls = Reloading::load(files, self.site.domain.clone()).map_err(|error| error.to_string())?;
        let expected = Identity::site(self.site.name.as_str());
        match tls.identity() == expected {
            true => Ok(tls),
            false => Err(format!("is for {}, this agent is {expected}", tls.identity())),
        }
    }
}

/// What is wrong with the certificate, where nothing is wrong with the files as such.
pub(super) fn check_tls(config: &Config, files: &[FileRef]) -> Option<Problem> {
    const KEY: &str = "tls.certificate_file";
    let what = config.open_tls().err()?;
    let line = files.iter().find(|file| file.key == KEY).and_then(|file| file.line);
    let mend =
        "use a certificate of this site in the trust domain of site.domain, its key, and the bundle of the fleet's CAs";
    Some(Problem { severity: Severity::Error, key: KEY.to_owned(), line, what, mend: mend.to_owned() })
}

fn directory_fault(path: &Path) -> Option<(String, String)> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => None,
        Ok(_) => Some((format!("{} is not a directory", path.display()), "name a directory of its own".to_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let missing = !parent.is_dir();
            missing.then(|| {
                (
                    format!("{} does not exist", parent.display()),
                    "create it; the agent makes only the last part of the path".to_owned(),
                )
            })
        }
        Err(error) => {
            Some((format!("cannot look at {}: {error}", path.display()), "let the agent's user in".to_owned()))
        }
    }
}

fn fault(path: &Path, kind: FileKind) -> Option<(String, String)> {
    if kind == FileKind::Directory {
        return directory_fault(path);
    }
    let shown = path.display();
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) => {
            return Some((
                format!("cannot read {shown}: {}", plain(&error)),
                "correct the path or create the file".to_owned(),
            ));
        }
    };
    if !meta.is_file() {
        return Some((format!("{shown} is not a file"), "name a file".to_owned()));
    }
    if kind != FileKind::Certificates
        && let Some(who) = too_open(meta.mode(), meta.uid(), own_uid())
    {
        let what = format!("{shown} holds a secret and can be read by {who} (mode {:04o})", meta.mode() & 0o7777);
        return Some((what, format!("chmod 600 {shown}")));
    }
    if meta.len() > MAX_BYTES {
        return Some((format!("{shown} is larger than 4 MiB"), "name the right file".to_owned()));
    }
    contents(path, kind)
}

fn contents(path: &Path, kind: FileKind) -> Option<(String, String)> {
    let shown = path.display();
    let holds = |label: &str| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).contains(label));
    let pem = |label: &str, noun: &str| match holds(label) {
        Ok(true) => None,
        Ok(false) => {
            Some((format!("{shown} holds no {noun} in PEM form"), format!("the file must have a line with {label}")))
        }
        Err(error) => {
            Some((format!("cannot read {shown}: {}", plain(&error)), "let the agent's user read it".to_owned()))
        }
    };
    let secret = |error: secret::Error| {
        let mend = match &error {
            secret::Error::Read { .. } => "let the agent's user read it",
            secret::Error::Empty { .. } => "write the password into its first line",
            secret::Error::NotAKey { .. } => "keep the old key if data was written with it",
        };
        (error.to_string(), mend.to_owned())
    };
    match kind {
        FileKind::Certificates => pem("BEGIN CERTIFICATE", "certificate"),
        FileKind::PrivateKey => pem("PRIVATE KEY-----", "private key"),
        FileKind::Password => secret::read_password(path).err().map(secret),
        FileKind::EncryptionKey => secret::read_encryption_key(path).err().map(secret),
        FileKind::Directory => None,
    }
}

/// Who can read a secret that should not, if anybody.
fn too_open(mode: u32, owner: u32, own: Option<u32>) -> Option<&'static str> {
    if mode & OTHERS != 0 {
        Some("everybody")
    } else if mode & GROUP != 0 && own.is_none_or(|own| own == owner) {
        Some("its group")
    } else {
        None
    }
}

/// The user this process runs as, where the system tells without a system call of our own.
fn own_uid() -> Option<u32> {
    fs::metadata("/proc/self").ok().map(|meta| meta.uid())
}

fn plain(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
        std::io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_must_be_closed_to_others() {
        assert_eq!(too_open(0o600, 5, Some(5)), None);
        assert_eq!(too_open(0o400, 5, Some(5)), None);
        assert_eq!(too_open(0o640, 5, Some(5)), Some("its group"));
        assert_eq!(too_open(0o440, 0, Some(1000)), None, "mounted by Kubernetes for the pod's group");
        assert_eq!(too_open(0o444, 0, Some(1000)), Some("everybody"));
        assert_eq!(too_open(0o640, 5, None), Some("its group"));
    }

    #[test]
    fn a_directory_may_be_missing_but_not_its_parent() {
        let dir = tempfile::tempdir().expect("dir");
        assert_eq!(directory_fault(dir.path()), None);
        assert_eq!(directory_fault(&dir.path().join("data")), None);
        assert!(directory_fault(&dir.path().join("no/data")).expect("fault").0.contains("does not exist"));
        let file = dir.path().join("file");
        std::fs::write(&file, "x").expect("write");
        assert!(directory_fault(&file).expect("fault").0.contains("is not a directory"));
    }
}
