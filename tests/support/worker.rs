//! What the guest `worker` does, done here: so we know what it has to say.

use std::time::Duration;

use super::Running;

/// Generous: a letter takes microseconds, a busy machine seconds.
const LIMIT: Duration = Duration::from_secs(60);

const PAGE_WORDS: usize = 4096 / size_of::<u64>();

/// The memory of a guest that was told some letters.
#[derive(Clone)]
pub struct Worker {
    memory: Vec<u64>,
    disk: Vec<u8>,
    random: u64,
    letters: u64,
}

impl Worker {
    /// One with `kib=` so much memory, and the contents of its disk.
    pub fn new(kib: usize, disk: Vec<u8>) -> Self {
        Self { memory: (1..=kib as u64 * 128).collect(), disk, random: 0x9e37_79b9_7f4a_7c15, letters: 0 }
    }

    /// The contents of a disk that is no two sectors alike.
    pub fn disk(len: usize) -> Vec<u8> {
        (0..len as u64 / 8).flat_map(|i| (i.wrapping_mul(0x0001_0203_0507_0b0d) + 1).to_le_bytes()).collect()
    }

    /// Tells the guest some letters, and does the same.
    pub fn tell(&mut self, running: &mut Running, letters: &str) {
        running.send(letters);
        self.recall(letters);
    }

    /// Asks the guest for its sum, which has to be ours.
    #[track_caller]
    pub fn check(&mut self, running: &mut Running) {
        self.tell(running, "s");
        running.output.wait_for(&format!("after {}: ", self.letters), LIMIT);
        running.output.wait_for(&self.says(), LIMIT);
    }

    /// What it says when it was asked last.
    pub fn says(&self) -> String {
        format!("after {}: {:x}\n", self.letters, self.sum())
    }

    /// What is on the guest's disk.
    pub fn disk_now(&self) -> &[u8] {
        &self.disk
    }

    /// Does what another has told the guest.
    pub fn recall(&mut self, letters: &str) {
        letters.chars().for_each(|letter| self.take(letter));
    }

    fn take(&mut self, letter: char) {
        self.letters += 1;
        match letter {
            'w' => {
                for _ in 0..64 {
                    let at = self.next() as usize % self.memory.len();
                    self.memory[at] = self.next();
                }
            }
            'z' => self.random_page().fill(0),
            'b' => {
                let page = self.next() as usize;
                let sector = self.next() as usize % (self.disk.len() / 512 - 7);
                let bytes: Vec<_> = self.page(page).iter().flat_map(|word| word.to_le_bytes()).collect();
                self.disk[sector * 512..][..4096].copy_from_slice(&bytes);
            }
            'd' => {
                let page = self.next() as usize;
                let sector = self.next() as usize % (self.disk.len() / 512 - 7);
                let from = self.disk[sector * 512..][..4096].chunks_exact(8);
                let words: Vec<_> = from.map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap())).collect();
                self.page(page).copy_from_slice(&words);
            }
            _ => {}
        }
    }

    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn random_page(&mut self) -> &mut [u64] {
        let number = self.next() as usize;
        self.page(number)
    }

    fn page(&mut self, number: usize) -> &mut [u64] {
        let count = self.memory.len() / PAGE_WORDS;
        &mut self.memory[number % count * PAGE_WORDS..][..PAGE_WORDS]
    }

    fn sum(&self) -> u64 {
        self.memory.iter().fold(0xcbf2_9ce4_8422_2325, |sum: u64, word| (sum ^ word).wrapping_mul(0x100_0000_01b3))
    }
}
