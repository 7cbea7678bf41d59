// Compiles files of CUDA C by NVRTC, which needs no GPU: `nvrtc ARCHITECTURE[,ARCHITECTURE] OPTION... -- FILE...`

#include <cstdio>
#include <cstring>
#include <fstream>
#include <nvrtc.h>
#include <sstream>
#include <string>
#include <vector>

static bool compiles(const char* path, const std::string& architecture, std::vector<const char*> options) {
    std::stringstream source;
    source << std::ifstream(path).rdbuf();
    const std::string option = "--gpu-architecture=" + architecture;
    options.push_back(option.c_str());
    nvrtcProgram program;
    if (nvrtcCreateProgram(&program, source.str().c_str(), path, 0, nullptr, nullptr) != NVRTC_SUCCESS) return false;
    const nvrtcResult result = nvrtcCompileProgram(program, int(options.size()), options.data());
    size_t log_bytes = 0, code_bytes = 0;
    nvrtcGetProgramLogSize(program, &log_bytes);
    std::string log(log_bytes, 0);
    nvrtcGetProgramLog(program, log.data());
    if (result == NVRTC_SUCCESS) nvrtcGetCUBINSize(program, &code_bytes);
    else fprintf(stderr, "%s for %s: %s\n%s\n", path, architecture.c_str(), nvrtcGetErrorString(result), log.c_str());
    nvrtcDestroyProgram(&program);
    return code_bytes > 0;
}

int main(int argc, char** argv) {
    std::vector<const char*> options;
    int at = 2;
    for (; at < argc && strcmp(argv[at], "--") != 0; ++at) options.push_back(argv[at]);
    bool all = at + 1 < argc;
    std::stringstream architectures(argv[1]);
    for (std::string architecture; std::getline(architectures, architecture, ',');) {
        for (int file = at + 1; file < argc; ++file) all &= compiles(argv[file], architecture, options);
    }
    return all ? 0 : 1;
}
