/*
 * Measures how a VM is saved and goes on again.
 *
 *   snapshots RUNS DIR KERNEL TRANCHE
 *
 * Each run starts `TRANCHE vmm` with a VM of 128 MiB whose guest KERNEL (worker) has touched 4 MiB and writes dots, saves
 * it below DIR, in a directory and in Firecracker's two files, and has the latter loaded and the former restored.
 * Prints, in microseconds:
 *   pause, durable MIN MEDIAN P90   of a save to a directory, as the VM tells them
 *   files MIN MEDIAN P90            /snapshot/create from the request to its answer
 *   load MIN MEDIAN P90             /snapshot/load from the request to its answer
 *   restore MIN MEDIAN P90          from just before the program's start to the restored guest's first byte
 * and in KiB, of the restored VMs:
 *   private MIN MEDIAN P90          memory that is its own, and in no file: what each further VM costs
 */
#define _GNU_SOURCE
#include "client.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

enum { LIMIT_US = 10000000, MAX_RUNS = 10000 };

extern char **environ;

/* Starts a program with its output in a pipe. */
static pid_t start(char **arguments, int *output)
{
    int pipe_of[2];
    if (pipe2(pipe_of, O_CLOEXEC) != 0)
        die("pipe2");
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&actions, pipe_of[1], STDOUT_FILENO);
    pid_t child;
    if (posix_spawn(&child, arguments[0], &actions, NULL, arguments, environ) != 0)
        die(arguments[0]);
    posix_spawn_file_actions_destroy(&actions);
    close(pipe_of[1]);
    *output = pipe_of[0];
    return child;
}

static void end(pid_t child, int output)
{
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    close(output);
}

/* Waits until the guest, which is ready, writes dots. */
static void wait_for_dots(int output)
{
    char text[256];
    ssize_t got;
    while ((got = read(output, text, sizeof text)) > 0)
        if (memchr(text, '.', got) != NULL)
            return;
    die("no dots");
}

static double number(const char *text, const char *key)
{
    const char *at = strstr(text, key);
    if (at == NULL)
        die(key);
    return atof(at + strlen(key));
}

/* Nobody reads the guest's dots: it may stand still in the middle of one, and its memory is as it was. */
static double private_kib(pid_t child)
{
    char path[64], text[4096];
    snprintf(path, sizeof path, "/proc/%d/smaps_rollup", child);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    const ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (got <= 0)
        die(path);
    close(fd);
    text[got] = 0;
    /* What is clean lies in a file, which further VMs share. */
    return number(text, "Private_Dirty:");
}

int main(int argc, char **argv)
{
    static double pauses[MAX_RUNS + 1], durables[MAX_RUNS + 1], files[MAX_RUNS + 1], loads[MAX_RUNS + 1],
        restores[MAX_RUNS + 1], privates[MAX_RUNS + 1];
    const int runs = argc == 5 ? atoi(argv[1]) : 0;
    if (runs < 1 || runs > MAX_RUNS) {
        fputs("usage: snapshots RUNS DIR KERNEL TRANCHE\n", stderr);
        return 2;
    }
    char socket_path[256], boot[1024], save[512], create[1024], load[1024], snapshot[256], command[512], answer[8192];
    snprintf(socket_path, sizeof socket_path, "%s/sock", argv[2]);
    snprintf(snapshot, sizeof snapshot, "%s/snap", argv[2]);
    snprintf(boot, sizeof boot, "{\"kernel_image_path\":\"%s\",\"boot_args\":\"kib=4096 beat=1\"}", argv[3]);
    snprintf(save, sizeof save, "{\"path\":\"%s\"}", snapshot);
    snprintf(create, sizeof create, "{\"snapshot_path\":\"%s/state\",\"mem_file_path\":\"%s/memory\"}", argv[2], argv[2]);
    snprintf(load, sizeof load,
             "{\"snapshot_path\":\"%s/state\",\"mem_backend\":{\"backend_type\":\"File\",\"backend_path\":\"%s/memory\"},"
             "\"resume_vm\":true}", argv[2], argv[2]);
    snprintf(command, sizeof command, "rm -rf '%s'", snapshot);
    char *vmm[] = {argv[4], "vmm", "--jail", "off", "--api-sock", socket_path, NULL};
    char *restore[] = {argv[4], "restore", "--jail", "off", snapshot, NULL};
    /* The first run warms the page cache, and is not counted. */
    for (int i = 0; i <= runs; i++) {
        int output;
        if (system(command) != 0)
            die(command);
        unlink(socket_path);
        pid_t child = start(vmm, &output);
        int fd = connect_to(socket_path, now() + LIMIT_US);
        ask(fd, "204", "PUT", "/boot-source", boot, answer, sizeof answer);
        ask(fd, "204", "PUT", "/actions", "{\"action_type\":\"InstanceStart\"}", answer, sizeof answer);
        wait_for_dots(output);
        /* Of a guest that writes, and does not hang on its output. */
        close(output);
        ask(fd, "200", "PUT", "/v2/vm/snapshot", save, answer, sizeof answer);
        pauses[i] = number(answer, "\"pause_us\":");
        durables[i] = number(answer, "\"durable_us\":");
        ask(fd, "204", "PATCH", "/vm", "{\"state\":\"Paused\"}", answer, sizeof answer);
        double begin = now();
        ask(fd, "204", "PUT", "/snapshot/create", create, answer, sizeof answer);
        files[i] = now() - begin;
        close(fd);
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);

        unlink(socket_path);
        child = start(vmm, &output);
        fd = connect_to(socket_path, now() + LIMIT_US);
        begin = now();
        ask(fd, "204", "PUT", "/snapshot/load", load, answer, sizeof answer);
        loads[i] = now() - begin;
        close(fd);
        end(child, output);

        begin = now();
        child = start(restore, &output);
        wait_for_dots(output);
        restores[i] = now() - begin;
        usleep(20000);
        privates[i] = private_kib(child);
        end(child, output);
    }
    print("pause", pauses + 1, runs);
    print("durable", durables + 1, runs);
    print("files", files + 1, runs);
    print("load", loads + 1, runs);
    print("restore", restores + 1, runs);
    print("private", privates + 1, runs);
    return 0;
}
